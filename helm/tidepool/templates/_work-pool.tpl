{{/* The file of k8s/work-pool/, with this installation's names as the defaults of its variables, as JSON.
     Takes (dict "root" $ "team" one-of-tidepool.teams). */}}
{{- define "tidepool.base-job-template" -}}
{{- $team := .team }}
{{- with .root }}
{{- $template := required "files/base-job-template.json is not in the chart: run `make chart-files`" (.Files.Get "files/base-job-template.json") | fromJson }}
{{- $flowRun := printf "%s-flow-run" (include "tidepool.fullname" .) }}
{{- $defaults := dict
      "namespace" $team.namespace
      "image" (include "tidepool.image" .)
      "image_pull_policy" .Values.image.pullPolicy
      "image_pull_secrets" .Values.image.pullSecrets
      "service_account_name" $flowRun
      "settings_config_map" $flowRun
      "credentials_secret" $team.flowRuns.credentialsSecret
      "priority_class" (.Values.priorityClasses.driver | default nil)
}}
{{- range $name, $value := merge (deepCopy $team.workPool.defaults) $defaults }}
{{- with get $template.variables.properties $name }}
{{- $_ := set . "default" $value }}
{{- end }}
{{- end }}
{{- $template | toPrettyJson }}
{{- end }}
{{- end }}
