{{/* Teams and the namespaces of their flow runs. Objects of the platform are in the release's namespace, with the team's
     suffix in their names; objects of flow runs are in the team's namespace, with the same name for every team. */}}

{{/* Every team as a JSON array of {suffix, namespace, workPool, flowRuns, networkPolicy: {storage}}. The first one is the
     default team, `flowRuns` and `workPool`, from which the others inherit all but `readable`; its suffix is empty.
     Use: range include "tidepool.teams" $ | fromJsonArray */}}
{{- define "tidepool.teams" -}}
{{- $inherited := dict
      "workPool" .Values.workPool
      "flowRuns" (omit .Values.flowRuns "namespace" "formerNamespaces" "api" "readable")
      "networkPolicy" (pick .Values.networkPolicy "storage")
}}
{{- $default := dict
      "suffix" ""
      "namespace" (.Values.flowRuns.namespace | default .Release.Namespace)
      "flowRuns" (pick .Values.flowRuns "readable")
}}
{{- $teams := list (merge $default $inherited) }}
{{- range $name, $own := .Values.teams }}
{{- $teams = append $teams (mergeOverwrite (deepCopy $inherited) (deepCopy $own) (dict "suffix" (printf "-%s" $name))) }}
{{- end }}
{{- $teams | toJson }}
{{- end }}

{{/* The same, and the default team again, with `former`, for each of `flowRuns.formerNamespaces`: every namespace of flow runs once. */}}
{{- define "tidepool.run-namespaces" -}}
{{- $all := include "tidepool.teams" . | fromJsonArray }}
{{- $default := first $all }}
{{- range .Values.flowRuns.formerNamespaces }}
{{- $all = append $all (merge (dict "namespace" . "former" true) $default) }}
{{- end }}
{{- $all | toJson }}
{{- end }}

{{/* Component names of a role that each team has: worker, worker-<team>, … Takes (list $ role). */}}
{{- define "tidepool.team-components" -}}
{{- $role := index . 1 }}
{{- $names := list }}
{{- range include "tidepool.teams" (index . 0) | fromJsonArray }}
{{- $names = append $names (printf "%s%s" $role .suffix) }}
{{- end }}
{{- join ", " $names }}
{{- end }}

{{/* Repository of the images of a team's flow runs. Takes (dict "root" $ "team" one-of-tidepool.teams). */}}
{{- define "tidepool.run-image-repository" -}}
{{- .team.flowRuns.imageRepository | default .root.Values.image.repository }}
{{- end }}
