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
    - podSelector:
        matchLabels:
          {{- include "tidepool.selector" (list . "server") | nindent 10 }}
  ports:
    - port: 4200
{{- end }}

{{/* Takes a component of a Dask cluster: scheduler or worker. The operator labels their pods. */}}
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
