{{/* Connection of the platform's own processes to the Prefect API and its database. */}}

{{- define "tidepool.api-url" -}}
http://{{ include "tidepool.fullname" . }}-server.{{ .Release.Namespace }}.svc:4200/api
{{- end }}

{{/* Environment of a client of the API. */}}
{{- define "tidepool.client-env" -}}
- name: PREFECT_API_URL
  value: {{ include "tidepool.api-url" . }}
- name: PREFECT_UI_URL
  value: {{ .Values.server.publicUrl }}/v2
{{- with .Values.auth.secretName }}
- name: PREFECT_API_AUTH_STRING
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.auth.secretKey }}
{{- end }}
# Never start an ephemeral server instead of one that cannot be reached.
- name: PREFECT_SERVER_EPHEMERAL_ENABLED
  value: "false"
# Bridges three minutes without a server (the default of 5 attempts gives up after one).
- name: PREFECT_CLIENT_MAX_RETRIES
  value: "15"
{{- end }}

{{/* Environment of every server process: API, background services, migration. */}}
{{- define "tidepool.server-env" -}}
- name: PREFECT_SERVER_ANALYTICS_ENABLED
  value: "false"
- name: PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT
  value: "false"
- name: PREFECT_SERVER_UI_STATIC_DIRECTORY
  value: /tmp/prefect-ui
- name: PREFECT_SERVER_UI_API_URL
  value: {{ .Values.server.publicUrl }}/api
- name: PREFECT_UI_URL
  value: {{ .Values.server.publicUrl }}/v2
- name: PREFECT_SERVER_METRICS_ENABLED
  value: "true"
- name: PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED
  value: events,flow_runs
- name: PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD
  value: {{ mul .Values.server.retentionDays 86400 | quote }}
{{- with .Values.auth.secretName }}
- name: PREFECT_SERVER_API_AUTH_STRING
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.auth.secretKey }}
{{- end }}
{{- with .Values.database.secretName }}
- name: PREFECT_SERVER_DATABASE_CONNECTION_URL
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.database.secretKey }}
# At Prefect's 5 s a busy node makes API requests end with 500, and the flow runs that made them fail.
- name: PREFECT_SERVER_DATABASE_CONNECTION_TIMEOUT
  value: "30"
# The migration Job has migrated the database before this pod starts.
- name: PREFECT_SERVER_DATABASE_MIGRATE_ON_START
  value: "false"
{{- end }}
{{- with .Values.redis.host }}
- name: PREFECT_MESSAGING_BROKER
  value: prefect_redis.messaging
- name: PREFECT_MESSAGING_CACHE
  value: prefect_redis.messaging
- name: PREFECT_SERVER_EVENTS_CAUSAL_ORDERING
  value: prefect_redis.ordering
- name: PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE
  value: prefect_redis.lease_storage
- name: PREFECT_REDIS_MESSAGING_HOST
  value: {{ . }}
- name: PREFECT_REDIS_MESSAGING_PORT
  value: {{ $.Values.redis.port | quote }}
- name: PREFECT_REDIS_MESSAGING_DB
  value: "0"
- name: PREFECT_SERVER_DOCKET_URL
  value: redis://{{ . }}:{{ $.Values.redis.port }}/1
{{- end }}
{{- range $name, $value := .Values.server.env }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}
