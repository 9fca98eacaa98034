{{/* Common parts of every pod of the platform. */}}

{{/* Metadata of a component's pods. Takes (list $ component .Values.<component>.pod annotations). */}}
{{- define "tidepool.pod-metadata" -}}
{{- $pod := index . 2 -}}
labels:
  {{- include "tidepool.labels" . | nindent 2 }}
  {{- with $pod.labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with merge (dict) (index . 3) ($pod.annotations | default dict) }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Pod spec head. Takes (dict "root" $ "pod" .Values.<component>.pod-or-nothing "account" name-or-empty).
     A token is mounted only for a component with its own ServiceAccount, unless "withoutToken" is true. Service links are off because
     Kubernetes would turn a Service into TIDEPOOL_* variables, which are not settings. */}}
{{- define "tidepool.pod" -}}
{{- $root := .root -}}
{{- $pod := .pod | default dict -}}
{{- with .account }}
serviceAccountName: {{ include "tidepool.fullname" $root }}-{{ . }}
{{- end }}
automountServiceAccountToken: {{ and (not (empty .account)) (not .withoutToken) }}
enableServiceLinks: false
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $pod.priorityClassName | default $root.Values.priorityClasses.platform }}
priorityClassName: {{ . }}
{{- end }}
{{- with merge (dict) ($pod.nodeSelector | default dict) $root.Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with concat $root.Values.tolerations ($pod.tolerations | default list) }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $pod.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $pod.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- $security := dict "runAsNonRoot" true "runAsUser" 10001 "runAsGroup" 10001 "fsGroup" 10001 "seccompProfile" (dict "type" "RuntimeDefault") }}
securityContext:
  {{- toYaml (merge (dict) ($pod.securityContext | default dict) $security) | nindent 2 }}
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
