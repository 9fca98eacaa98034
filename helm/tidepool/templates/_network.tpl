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

{{/* Ports of the Prefect API for the runs of a namespace: the proxy's, or the server's if `flowRuns.api` is open. Runs in
     flight in a former namespace may use either. Takes (list $ one-of-tidepool.run-namespaces). */}}
{{- define "tidepool.flow-run-api-ports" -}}
{{- $restricted := include "tidepool.flow-run-api-restricted" (index . 0) }}
{{- $former := (index . 1).former }}
{{- if or $restricted $former }}
- port: 4201
{{- end }}
{{- if or (not $restricted) $former }}
- port: 4200
{{- end }}
{{- end }}

{{- define "tidepool.egress-flow-run-api" -}}
- to:
    - {{- include "tidepool.in-namespace" (index . 0).Release.Namespace | nindent 6 }}
      podSelector:
        matchLabels:
          {{- include "tidepool.selector" (list (index . 0) "server") | nindent 10 }}
  ports:
    {{- include "tidepool.flow-run-api-ports" . | trim | nindent 4 }}
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
