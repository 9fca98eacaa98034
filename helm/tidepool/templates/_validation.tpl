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
{{- if and .Values.notifications.secretName .Values.networkPolicy.enabled (not .Values.networkPolicy.exporterEgress) }}
{{- fail "notifications.secretName needs networkPolicy.exporterEgress, the egress rules to the receivers: [{ports: [{port: 443}]}] allows HTTPS" }}
{{- end }}
{{- $known := keys (.Files.Get "files/base-job-template.json" | fromJson).variables.properties }}
{{- $namespaces := list }}
{{- $pools := list }}
{{- $current := list }}
{{- range include "tidepool.run-namespaces" . | fromJsonArray }}
{{- $where := ternary "" (printf "teams.%s." (trimPrefix "-" .suffix)) (empty .suffix) }}
{{- if has .namespace $namespaces }}
{{- fail (printf "namespace %s is given twice in flowRuns and teams: each team, and each former namespace, is another one" .namespace) }}
{{- end }}
{{- $namespaces = append $namespaces .namespace }}
{{- range $name, $_ := .workPool.defaults }}
{{- if not (has $name $known) }}
{{- fail (printf "%sworkPool.defaults.%s is not a variable of the base job template; known: %s" $where $name (join ", " (sortAlpha $known))) }}
{{- end }}
{{- end }}
{{- range $name, $_ := .flowRuns.env }}
{{- if not (regexMatch "^(TIDEPOOL|PREFECT)_[A-Z0-9_]+$" $name) }}
{{- fail (printf "%sflowRuns.env.%s is not a setting: use names that start with TIDEPOOL_ or PREFECT_" $where $name) }}
{{- end }}
{{- end }}
{{- end }}
{{- range include "tidepool.teams" . | fromJsonArray }}
{{- if has .workPool.name $pools }}
{{- fail (printf "work pool %s is given twice in workPool and teams: each team has its own" .workPool.name) }}
{{- end }}
{{- $pools = append $pools .workPool.name }}
{{- $current = append $current .namespace }}
{{- end }}
{{- if and .Values.teams (has .Release.Namespace $current) }}
{{- fail (printf "teams needs flowRuns.namespace, and namespaces other than %s: runs there could name the platform's Secrets" .Release.Namespace) }}
{{- end }}
{{- $tokens := list .Values.auth.secretName }}
{{- range include "tidepool.teams" . | fromJsonArray }}
{{- $where := ternary "" (printf "teams.%s." (trimPrefix "-" .suffix)) (empty .suffix) }}
{{- if include "tidepool.flow-run-api-restricted" $ }}
{{- if and (or $.Values.auth.secretName $.Values.teams) (not .flowRuns.apiSecret) }}
{{- fail (printf "%sflowRuns.apiSecret is empty: with auth.secretName or teams, and flowRuns.api=restricted, it must name a Secret with the token of flow runs (docs/security.md says how to make it); or set flowRuns.api=open" $where) }}
{{- end }}
{{- if and .flowRuns.apiSecret (has .flowRuns.apiSecret $tokens) }}
{{- fail (printf "%sflowRuns.apiSecret is %s, which is in use: the platform and each team have a Secret of their own" $where .flowRuns.apiSecret) }}
{{- end }}
{{- $tokens = append $tokens .flowRuns.apiSecret }}
{{- end }}
{{- end }}
{{- end }}
