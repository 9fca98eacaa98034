{{/* Keys of the ConfigMap <fullname>-flow-run-rules, as YAML: the parameters of tidepool/operate/object_rules.py. A list is
     comma-separated. Takes (dict "root" $ "team" one-of-tidepool.run-namespaces). */}}
{{- define "tidepool.flow-run-rules" -}}
{{- $root := .root }}
{{- $runs := .team.flowRuns }}
{{- $env := $runs.env }}
{{- $defaults := .team.workPool.defaults }}
{{- $repository := include "tidepool.run-image-repository" . }}
{{- $repositories := list $repository }}
{{- /* A node names an image of Docker Hub with the registry, which its short name leaves out. */}}
{{- $first := first (splitList "/" $repository) }}
{{- if eq $first $repository }}
{{- $repositories = append $repositories (printf "docker.io/library/%s" $repository) }}
{{- else if not (or (contains "." $first) (contains ":" $first) (eq $first "localhost")) }}
{{- $repositories = append $repositories (printf "docker.io/%s" $repository) }}
{{- end }}
{{- $tolerations := $runs.allowed.tolerations }}
{{- range concat ($defaults.tolerations | default list) (get $env "TIDEPOOL_KUBERNETES_WORKER_TOLERATIONS" | default "[]" | fromJsonArray) }}
{{- $tolerations = append $tolerations .key }}
{{- end }}
{{- $selectors := concat $runs.allowed.nodeSelectors (keys ($defaults.node_selector | default dict)) }}
{{- $selectors = concat $selectors (keys (get $env "TIDEPOOL_KUBERNETES_WORKER_NODE_SELECTOR" | default "{}" | fromJson)) }}
{{- $pullSecrets := list }}
{{- range $root.Values.image.pullSecrets }}
{{- $pullSecrets = append $pullSecrets .name }}
{{- end }}
{{- $secrets := list $runs.credentialsSecret (include "tidepool.flow-run-auth" . | fromJson).name }}
{{- /* Runs in flight there have the password that the chart gave them before. */}}
{{- if .team.former }}
{{- $secrets = append $secrets $root.Values.auth.secretName }}
{{- end }}
{{- $account := printf "%s-flow-run" (include "tidepool.fullname" $root) }}
annotations: {{ join "," $runs.allowed.annotations | quote }}
configMaps: {{ $account }}
{{- /* Without a digest nothing but the tag is known of the platform's own image. */}}
images: {{ ternary "" (include "tidepool.image" $root) (or (not (empty $root.Values.image.digest)) (ne $repository $root.Values.image.repository)) | quote }}
labels: {{ join "," $runs.allowed.labels | quote }}
maxCpu: {{ get $env "TIDEPOOL_KUBERNETES_MAX_CPU" | default "100" | quote }}
maxDisk: {{ $runs.allowed.disk }}
maxMemory: {{ get $env "TIDEPOOL_KUBERNETES_MAX_MEMORY_GIB" | default "400" }}Gi
maxWorkers: {{ get $env "TIDEPOOL_KUBERNETES_MAX_WORKERS" | default "50" | quote }}
nodeSelectors: {{ join "," (uniq (sortAlpha $selectors)) | quote }}
priorityClasses: {{ join "," (uniq (compact (concat (list $root.Values.priorityClasses.driver $root.Values.priorityClasses.worker (get $env "TIDEPOOL_KUBERNETES_WORKER_PRIORITY_CLASS")) $runs.allowed.priorityClasses))) | quote }}
pullSecrets: {{ join "," $pullSecrets | quote }}
repositories: {{ join "," $repositories }}
secrets: {{ join "," (uniq (compact $secrets)) | quote }}
serviceAccounts: {{ $account }}
tolerations: {{ join "," (uniq (sortAlpha $tolerations)) | quote }}
{{- end }}
