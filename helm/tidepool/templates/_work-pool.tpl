{{/* The file of k8s/work-pool/ as JSON, with what belongs to this installation: namespace, account, Secrets, images, and
     the defaults of `workPool.defaults`. Takes (dict "root" $ "team" one-of-tidepool.teams). The paths that are set
     here are those of tidepool/deploy/reconcile/work_pool.py, which `tidepool apply` leaves alone. */}}
{{- define "tidepool.base-job-template" -}}
{{- $team := .team }}
{{- with .root }}
{{- $flowRun := printf "%s-flow-run" (include "tidepool.fullname" .) }}
{{- $template := required "files/base-job-template.json is not in the chart: run `make chart-docs`" (.Files.Get "files/base-job-template.json") | fromJson }}
{{- $configuration := $template.job_configuration }}
{{- $_ := set $configuration "namespace" $team.namespace }}
{{- $_ := set $configuration.job_manifest.metadata "namespace" $team.namespace }}
{{- $pod := $configuration.job_manifest.spec.template.spec }}
{{- $_ := set $pod "serviceAccountName" $flowRun }}
{{- $_ := set $pod "imagePullSecrets" .Values.image.pullSecrets }}
{{- with .Values.priorityClasses.driver }}
{{- $_ := set $pod "priorityClassName" . }}
{{- end }}
{{- $container := first $pod.containers }}
{{- $_ := set $container "imagePullPolicy" .Values.image.pullPolicy }}
{{- $_ := set $container "envFrom" (list
      (dict "configMapRef" (dict "name" $flowRun))
      (dict "secretRef" (dict "name" $team.flowRuns.credentialsSecret "optional" true))
) }}
{{- $repository := include "tidepool.run-image-repository" (dict "root" . "team" $team) }}
{{- $image := $template.variables.properties.image }}
{{- if eq $repository .Values.image.repository }}
{{- $_ := set $image "default" (include "tidepool.image" .) }}
{{- end }}
{{- $tag := ternary "" "|:[A-Za-z0-9_.-]+" (not (empty .Values.image.digest)) }}
{{- $_ := set $image "pattern" (printf "^%s(@sha256:[0-9a-f]{64}%s)$" (regexQuoteMeta $repository) $tag) }}
{{- range $name, $value := $team.workPool.defaults }}
{{- $_ := set (get $template.variables.properties $name) "default" $value }}
{{- end }}
{{- $_ := set $template.job_configuration.env "PREFECT_API_URL" (include "tidepool.flow-run-api-url" .) }}
{{- $template | toPrettyJson }}
{{- end }}
{{- end }}
