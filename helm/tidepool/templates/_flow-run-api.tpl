{{/* The proxy between flow runs and the Prefect server: its configuration, from files/flow-run-api.yaml. */}}

{{- define "tidepool.flow-run-api-restricted" -}}
{{- if eq .Values.flowRuns.api "restricted" }}yes{{ end }}
{{- end }}

{{/* URL of the Prefect API for flow runs. */}}
{{- define "tidepool.flow-run-api-url" -}}
{{- if include "tidepool.flow-run-api-restricted" . -}}
http://{{ include "tidepool.fullname" . }}-flow-run-api.{{ .Release.Namespace }}.svc:4201/api
{{- else -}}
{{ include "tidepool.api-url" . }}
{{- end }}
{{- end }}

{{/* Secret and key of what a team's runs authenticate with, as JSON {name, key}; name is empty without authentication. */}}
{{- define "tidepool.flow-run-auth" -}}
{{- if include "tidepool.flow-run-api-restricted" .root -}}
{{ dict "name" .team.flowRuns.apiSecret "key" "auth-string" | toJson }}
{{- else -}}
{{ dict "name" .root.Values.auth.secretName "key" .root.Values.auth.secretKey | toJson }}
{{- end }}
{{- end }}

{{/* JSON as a regular expression that takes linear time: (?&v) is a value, (?&s) a text, (?&w) white space. Whatever it
     matches, every JSON parser reads alike, but for repeated keys; therefore every occurrence of a key is checked. A key
     is written without \u, and is not __prefect_kind: the server would replace its value by a variable's, or render it.
     PostgreSQL stores no NUL. */}}
{{- define "tidepool.flow-run-api-json" -}}
(?(DEFINE)(?<s>"(?:[^"\\\x00-\x1f]++|\\["\\/bfnrt]|\\u(?!0000)[0-9a-fA-F]{4})*+")(?<k>(?!"__prefect_kind")"(?:[^"\\\x00-\x1f]++|\\["\\/bfnrt])*+")(?<n>-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?)(?<w>[ \t\r\n]*+)(?<m>(?&k)(?&w):(?&v))(?<v>(?&w)(?:(?&s)|(?&n)|true|false|null|\[(?:(?&w)\]|(?&v)(?:,(?&v))*+\])|\{(?&w)(?:\}|(?&m)(?:,(?&w)(?&m))*+\}))(?&w)))
{{- end }}

{{/* The regular expression of a call's body. Takes an entry of `calls`. */}}
{{- define "tidepool.flow-run-api-body" -}}
{{- $uuid := "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}" }}
{{- $pattern := .body | default "" }}
{{- if .keys }}
{{- $members := list }}
{{- range $key, $value := .keys }}
{{- $members = append $members (printf "\"%s\"(?&w):%s" $key ($value | default "{json}" | printf "(?&w)(?:%s)(?&w)")) }}
{{- end }}
{{- $member := printf "(?:%s)" (join "|" $members) }}
{{- $pattern = printf "(?&w)\\{(?&w)(?:%s(?:,(?&w)%s)*+)?+\\}(?&w)" $member $member }}
{{- end }}
{{- $pattern = $pattern | replace "{json}" "(?&v)" | replace "{text}" "(?&s)" | replace "{uuids}" (printf "\\[\"%s\"(?:,\"%s\")*+\\]" $uuid $uuid) }}
{{- include "tidepool.flow-run-api-json" . }}^(?:{{ $pattern }})$
{{- end }}

{{/* One line per call: `<team>:<method>:<path>` as a regular expression, and which rule its body has. */}}
{{- define "tidepool.flow-run-api-calls" -}}
{{- $uuid := "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}" }}
{{- range $index, $entry := (.Files.Get "files/flow-run-api.yaml" | fromYaml).calls }}
{{- $call := splitList " " $entry.call }}
{{- $rule := "any" }}
{{- if or $entry.keys $entry.body }}{{ $rule = printf "body-%d" $index }}{{ end }}
{{- if $entry.websocket }}{{ $rule = "websocket" }}{{ end }}
{{- $path := last $call | replace "{id}" $uuid | replace "{name}" "(?:[A-Za-z0-9_.~-]|%20)+" }}
{{- if has ($entry.only | default "") (list "variables" "blocks") }}
{{- range $number, $team := include "tidepool.teams" $ | fromJsonArray }}
{{- range get ($team.flowRuns.readable | default dict) $entry.only | default list }}
{{- $names := splitList "/" . }}
{{- $readable := $path | replace "{type}" (first $names) | replace "{readable}" (last $names | replace "." "\\.") }}
^{{ $number }}:{{ first $call }}:/api{{ $readable }}$ {{ $rule }}
{{- end }}
{{- end }}
{{- else }}
^{{ ternary "0" "[0-9]+" (eq ($entry.only | default "") "default-team") }}:{{ first $call }}:/api{{ $path }}$ {{ $rule }}
{{- end }}
{{- end }}
{{- end }}

{{/* Answer of a refused call. Takes the sentence, with HAProxy's variables. */}}
{{- define "tidepool.flow-run-api-refusal" -}}
http-request return status {{ .status }} content-type application/json hdr Connection close lf-string '{"detail":"{{ .text }}"}'
{{- end }}

{{- define "tidepool.flow-run-api-config" -}}
{{- $calls := (.Files.Get "files/flow-run-api.yaml" | fromYaml).calls }}
{{- $call := "%[method,json(utf8s)] %[path,json(utf8s)]" -}}
{{- $file := "see helm/tidepool/files/flow-run-api.yaml" -}}
global
    log stdout format raw local0
    nbthread 1
    # With a buffer for each, below the memory of `flowRunApi.resources`.
    maxconn 2000
    # Fewer connections where the node allows fewer open files, not a refusal to start.
    no strict-limits
    # A body that has a rule must fit: 127 KiB. All others pass in pieces.
    tune.bufsize 131072
    hard-stop-after 30s

defaults
    mode http
    timeout connect 5s
    timeout http-request 30s
    timeout http-keep-alive 60s
    timeout client 5m
    timeout server 5m
    # Websockets; both sides ping every 20 s.
    timeout tunnel 1h

frontend flow-runs
    bind :4201
    log global
    # Refused calls, which pass no http-response rule, and failures; not each call.
    http-response set-log-level silent if { status lt 500 }
    # A connection that ends before its first request is a probe's or a killed run's: nothing was refused.
    option http-ignore-probes
    log-format "flow-run-api team=%[var(txn.team)] %ci %ST %ts %{+Q}r"
    option disable-h2-upgrade
    option http-restrict-req-hdr-names reject
    # A pod opens five connections, and two for each thread that runs tasks.
    stick-table type ipv6 size 100k expire 30s store conn_cur
    tcp-request connection track-sc0 src
    tcp-request connection reject if { sc0_conn_cur gt 200 }

    # One spelling for each call, so that proxy and server understand the same.
    acl plain-version req.ver 1.1
    acl plain-url url -m reg '^/api/[A-Za-z0-9_./~%-]*(?:[?][A-Za-z0-9_.,:;/~%=&+-]*)?$'
    acl odd-path path -m reg '//|/[.]|[.]/|%(?!20)'
    {{ include "tidepool.flow-run-api-refusal" (dict "status" 400 "text" "not a request as Prefect sends it: HTTP/1.1, no escapes, dots or double slashes in the path, no header twice") }} if !plain-version or !plain-url or odd-path or { req.hdr(content-encoding) -m found } or { req.fhdr_cnt(authorization) gt 1 } or { req.fhdr_cnt(content-type) gt 1 }

    # Nothing but these headers reaches the server.
    http-request set-var(txn.given) req.fhdr(authorization)
    http-request del-header '^(?!(?:accept|accept-encoding|connection|content-length|content-type|host|prefect-csrf-client|prefect-csrf-token|sec-websocket-[a-z]+|te|traceparent|tracestate|transfer-encoding|upgrade|user-agent|x-prefect-api-version)$)' -m reg
    # Prefect recognises an in-process client by the host's name.
    http-request set-header Host {{ include "tidepool.fullname" . }}-flow-run-api.{{ .Release.Namespace }}.svc:4201
    http-request allow if { method GET } { path /api/health } !{ req.hdr(upgrade) -m found }
{{ $tokens := list }}
{{- range $number, $team := include "tidepool.teams" . | fromJsonArray }}
{{- if $team.flowRuns.apiSecret }}
    http-request set-var(txn.token) env(FLOW_RUN_API_TOKEN_{{ $number }}),base64
    http-request set-var(txn.expected) str("Basic "),concat(,txn.token)
    http-request set-var(txn.team) int({{ $number }}) if { var(txn.token) -m len ge 4 } { var(txn.given),secure_memcmp(txn.expected) }
{{- $tokens = append $tokens $number }}
{{- end }}
{{- end }}
{{- if $tokens }}
    {{ include "tidepool.flow-run-api-refusal" (dict "status" 401 "text" "the token is not one of flowRuns.apiSecret") }} unless { var(txn.team) -m found }
{{- else }}
    # Without a Secret every run is one of the default team.
    http-request set-var(txn.team) int(0)
{{- end }}
    # The server reads a body as a whole, several times its size in memory. A batch of log lines has at most 4 MB.
    {{ include "tidepool.flow-run-api-refusal" (dict "status" 413 "text" "a call needs a Content-Length, of at most 5 MiB") }} if { req.hdr(transfer-encoding) -m found } or { req.hdr_val(content-length) gt 5242880 }
    http-request set-var-fmt(txn.call) "%[var(txn.team)]:%[method]:%[path]"
    http-request set-var(txn.rule) var(txn.call),map_reg({{ include "tidepool.flow-run-api-folder" . }}/calls.map)
    {{ include "tidepool.flow-run-api-refusal" (dict "status" 403 "text" (printf "%s is not a call that a flow run may make; %s" $call $file)) }} unless { var(txn.rule) -m found }
    {{ include "tidepool.flow-run-api-refusal" (dict "status" 403 "text" (printf "%s is not a websocket; %s" $call $file)) }} if { req.hdr(upgrade) -m found } !{ var(txn.rule) -m str websocket }
    {{ include "tidepool.flow-run-api-refusal" (dict "status" 403 "text" (printf "%s is a websocket; %s" $call $file)) }} if { var(txn.rule) -m str websocket } !{ req.hdr(upgrade) -i -m str websocket }

    acl has-body-rule var(txn.rule) -m beg body-
    http-request wait-for-body time 30s if has-body-rule
    http-request set-var(txn.size) req.body_size if has-body-rule
    # `length` ends at a NUL, which is how JSON in UTF-16 begins.
    acl whole-body req.body,length,sub(txn.size) eq 0
    {{ include "tidepool.flow-run-api-refusal" (dict "status" 413 "text" (printf "%s needs a Content-Length and a body of UTF-8 below 127 KiB; %s" $call $file)) }} if has-body-rule { req.hdr(transfer-encoding) -m found } or has-body-rule !whole-body
{{- range $index, $entry := $calls }}
{{- if $entry.keys }}
    {{ include "tidepool.flow-run-api-refusal" (dict "status" 403 "text" (printf "the body of %s may have these keys only: %s; %s" $call (keys $entry.keys | sortAlpha | join ", ") $file)) }} if { var(txn.rule) -m str body-{{ $index }} } !{ req.body -m reg -f {{ include "tidepool.flow-run-api-folder" $ }}/body-{{ $index }}.re }
{{- else if $entry.body }}
    {{ include "tidepool.flow-run-api-refusal" (dict "status" 403 "text" (printf "the body of %s asks for more than a flow run may have; %s" $call $file)) }} if { var(txn.rule) -m str body-{{ $index }} } !{ req.body -m reg -f {{ include "tidepool.flow-run-api-folder" $ }}/body-{{ $index }}.re }
{{- end }}
{{- end }}

    # The server's own password instead of the token, and the team's work pool (tidepool.operate.server).
{{- range $number, $team := include "tidepool.teams" . | fromJsonArray }}
    http-request set-header X-Tidepool-Flow-Run "{{ $team.workPool.name | urlquery | replace "%" "%%" }}" if { var(txn.team) -m int {{ $number }} }
{{- end }}
{{- if .Values.auth.secretName }}
    http-request set-header Authorization "Basic %[env(FLOW_RUN_API_SERVER),base64]"
{{- end }}
    default_backend server

backend server
    server prefect 127.0.0.1:4200
{{- end }}

{{- define "tidepool.flow-run-api-folder" -}}
/etc/flow-run-api
{{- end }}

{{/* Environment of the proxy; empty without authentication. */}}
{{- define "tidepool.flow-run-api-secrets" -}}
{{- $secrets := list }}
{{- with .Values.auth.secretName }}
{{- $secrets = append $secrets (list "FLOW_RUN_API_SERVER" . $.Values.auth.secretKey) }}
{{- end }}
{{- range $number, $team := include "tidepool.teams" . | fromJsonArray }}
{{- with $team.flowRuns.apiSecret }}
{{- $secrets = append $secrets (list (printf "FLOW_RUN_API_TOKEN_%d" $number) . "auth-string") }}
{{- end }}
{{- end }}
{{- range $secrets }}
- name: {{ index . 0 }}
  valueFrom:
    secretKeyRef:
      name: {{ index . 1 }}
      key: {{ index . 2 }}
{{- end }}
{{- end }}
