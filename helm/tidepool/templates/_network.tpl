{{/* Rules that several NetworkPolicies share. */}}

{{- define "tidepool.egress-dns" -}}
- to:
    {{- toYaml .Values.networkPolicy.dns | nindent 4 }}
  ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
{{- end }}

{{- define "tidepool.egress-prefect-api" -}}
- to:
    - {{- include "tidepool.in-namespace" .Release.Namespace | nindent 6 }}
      podSelector:
        matchLabels:
          {{- include "tidepool.selector" (list . "server") | nindent 10 }}
  ports:
    - port: 4200
{{- end }}

{{/* The namespace of a peer, by the label that Kubernetes itself keeps equal to the name. */}}
{{- define "tidepool.in-namespace" -}}
namespaceSelector:
  matchLabels:
    kubernetes.io/metadata.name: {{ . }}
{{- end }}

{{/* Selector of Dask pods; takes the component, scheduler or worker. The operator sets these labels. */}}
{{- define "tidepool.dask-pods" -}}
podSelector:
  matchLabels:
    dask.org/component: {{ . }}
{{- end }}

{{/* A driver: labelled by the base job template. */}}
{{- define "tidepool.flow-run-pods" -}}
podSelector:
  matchLabels:
    app.kubernetes.io/component: flow-run
{{- end }}
