{{/* Teams and the namespaces of their flow runs. Objects of the platform are in the release's namespace, with the team's
     suffix in their names; objects of flow runs are in the team's namespace, with the same name for every team. */}}

{{/* Every team as a JSON array of {suffix, namespace, workPool, flowRuns, networkPolicy: {storage}}. The first one is the
     default team, `flowRuns` and `workPool`, which the others inherit from; its suffix is empty.
     {{- range include "tidepool.teams" $ | fromJsonArray }} */}}
{{- define "tidepool.teams" -}}
{{- $values := .Values }}
{{- $inherited := dict
      "workPool" $values.workPool
      "flowRuns" (omit $values.flowRuns "namespace" "formerNamespaces")
      "networkPolicy" (pick $values.networkPolicy "storage")
}}
{{- $teams := list (merge (dict "suffix" "" "namespace" ($values.flowRuns.namespace | default .Release.Namespace)) $inherited) }}
{{- range $name, $own := $values.teams }}
{{- $teams = append $teams (mergeOverwrite (deepCopy $inherited) $own (dict "suffix" (printf "-%s" $name))) }}
{{- end }}
{{- $teams | toJson }}
{{- end }}

{{/* The same, and one more of the default team for each of `flowRuns.formerNamespaces`: every namespace of flow runs once. */}}
{{- define "tidepool.run-namespaces" -}}
{{- $teams := include "tidepool.teams" . | fromJsonArray }}
{{- $all := $teams }}
{{- range .Values.flowRuns.formerNamespaces }}
{{- $all = append $all (merge (dict "namespace" .) (first $teams)) }}
{{- end }}
{{- $all | toJson }}
{{- end }}

{{/* Names of a component of the platform that every team has: worker, worker-<team>, … Takes (list $ component). */}}
{{- define "tidepool.team-components" -}}
{{- $names := list }}
{{- range include "tidepool.teams" (index . 0) | fromJsonArray }}
{{- $names = append $names (printf "%s%s" (index $ 1) .suffix) }}
{{- end }}
{{- join ", " $names }}
{{- end }}
