{{/* Rules that the schema cannot express. Each message names the key, the problem and the accepted values. */}}
{{- define "tidepool.validate" -}}
{{- $shared := and .Values.database.secretName .Values.redis.host }}
{{- if and (gt (int .Values.server.replicas) 1) (or (not $shared) (not .Values.services.replicas)) }}
{{- fail (printf "server.replicas is %d: more than one needs database.secretName (PostgreSQL), redis.host and services.replicas" (int .Values.server.replicas)) }}
{{- end }}
{{- if and .Values.services.replicas (not $shared) }}
{{- fail (printf "services.replicas is %d: separate pods need database.secretName (PostgreSQL) and redis.host" (int .Values.services.replicas)) }}
{{- end }}
{{- if and .Values.registration.enabled (not .Values.image.digest) }}
{{- fail "registration.enabled needs image.digest (`make image` prints it): deployments pin their image by digest; or set registration.enabled=false" }}
{{- end }}
{{- if and .Values.ingress.enabled (not (hasPrefix "https://" .Values.server.publicUrl)) }}
{{- fail (printf "server.publicUrl is %s: with ingress.enabled it must be an https:// address" .Values.server.publicUrl) }}
{{- end }}
{{- $known := keys (include "tidepool.base-job-template" . | fromJson).variables.properties }}
{{- range $name, $_ := .Values.workPool.defaults }}
{{- if not (has $name $known) }}
{{- fail (printf "workPool.defaults.%s is not a variable of the base job template; known: %s" $name (join ", " (sortAlpha $known))) }}
{{- end }}
{{- end }}
{{- range $name, $_ := .Values.flowRuns.env }}
{{- if not (regexMatch "^(TIDEPOOL|PREFECT)_[A-Z0-9_]+$" $name) }}
{{- fail (printf "flowRuns.env.%s is not a setting: use names that start with TIDEPOOL_ or PREFECT_" $name) }}
{{- end }}
{{- end }}
{{- end }}
