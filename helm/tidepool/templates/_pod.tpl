{{/* Common parts of every pod of the platform. */}}

{{/* Pod spec head. Takes (dict "root" $ "values" .Values.<component> "account" name-or-empty).
     A token is mounted only for a component with its own ServiceAccount, unless "withoutToken" is true. Service links are off because
     Kubernetes would turn a Service into TIDEPOOL_* variables, which are not settings. */}}
{{- define "tidepool.pod" -}}
{{- $root := .root -}}
{{- with .account }}
serviceAccountName: {{ include "tidepool.fullname" $root }}-{{ . }}
{{- end }}
automountServiceAccountToken: {{ and (not (empty .account)) (not .withoutToken) }}
enableServiceLinks: false
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $root.Values.priorityClasses.platform }}
priorityClassName: {{ . }}
{{- end }}
{{- with $root.Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $root.Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  seccompProfile:
    type: RuntimeDefault
{{- end }}

{{- define "tidepool.container" -}}
image: {{ include "tidepool.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end }}

{{/* /tmp is the only writable folder: HOME, PREFECT_HOME and Dask's scratch space are in it. */}}
{{- define "tidepool.tmp-mount" -}}
- name: tmp
  mountPath: /tmp
{{- end }}
{{- define "tidepool.tmp-volume" -}}
- name: tmp
  emptyDir:
    sizeLimit: {{ . }}
{{- end }}
