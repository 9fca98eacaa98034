{{/* Keys of the ConfigMap <fullname>-flow-run-rules, as YAML. Takes (dict "root" $ "team" one-of-tidepool.run-namespaces). */}}
{{- define "tidepool.flow-run-rules" -}}
{}
{{- end }}
