{{/* Names and labels. */}}
{{- define "sidecar.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" (.Release.Name | trunc 32 | trimSuffix "-") .Chart.Name }}{{ end }}
{{- end }}

{{- define "sidecar.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "sidecar.labels" -}}
{{ include "sidecar.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- define "sidecar.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{/* What every pod has. Service links would put SIDECAR_… variables into it, which are no settings. */}}
{{- define "sidecar.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* What every container has. */}}
{{- define "sidecar.container" -}}
image: {{ include "sidecar.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  runAsNonRoot: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* Environment of a role (data, control, worker, migrator): where its secrets lie. */}}
{{- define "sidecar.env" -}}
- {name: SIDECAR_CONFIG, value: /etc/sidecar/sidecar.yaml}
- {name: SIDECAR_POSTGRES__DSN_{{ upper .role }}_FILE, value: /run/secrets/sidecar/dsn}
{{- with .root.Values.secrets.kafka }}
{{- if .password.name }}
- {name: SIDECAR_KAFKA__SECURITY__PASSWORD_FILE, value: /run/secrets/sidecar/kafka-password}
{{- end }}
{{- if .ca.name }}
- {name: SIDECAR_KAFKA__SECURITY__CA_FILE, value: /run/secrets/sidecar/kafka-ca.crt}
{{- end }}
{{- if .client.name }}
- {name: SIDECAR_KAFKA__SECURITY__CERTIFICATE_FILE, value: /run/secrets/sidecar/kafka-client.crt}
- {name: SIDECAR_KAFKA__SECURITY__KEY_FILE, value: /run/secrets/sidecar/kafka-client.key}
{{- end }}
{{- end }}
{{- end }}

{{- define "sidecar.mounts" -}}
- {name: config, mountPath: /etc/sidecar, readOnly: true}
- {name: secrets, mountPath: /run/secrets/sidecar, readOnly: true}
- {name: tmp, mountPath: /tmp}
{{- end }}

{{/* Volumes of a role; `config` is the name of its ConfigMap. */}}
{{- define "sidecar.volumes" -}}
- name: config
  configMap: {name: {{ .config }}}
- name: tmp
  emptyDir: {sizeLimit: 64Mi}
- name: secrets
  projected:
    defaultMode: 0440
    sources:
      {{- $dsn := index .root.Values.secrets.postgres .role }}
      - secret: {name: {{ $dsn.name | quote }}, items: [{key: {{ $dsn.key | quote }}, path: dsn}]}
      {{- with .root.Values.secrets.postgres.ca }}
      {{- if .name }}
      - secret: {name: {{ .name | quote }}, items: [{key: {{ .key | quote }}, path: postgres-ca.crt}]}
      {{- end }}
      {{- end }}
      {{- with .root.Values.secrets.kafka }}
      {{- if .password.name }}
      - secret: {name: {{ .password.name | quote }}, items: [{key: {{ .password.key | quote }}, path: kafka-password}]}
      {{- end }}
      {{- if .ca.name }}
      - secret: {name: {{ .ca.name | quote }}, items: [{key: {{ .ca.key | quote }}, path: kafka-ca.crt}]}
      {{- end }}
      {{- if .client.name }}
      - secret: {name: {{ .client.name | quote }}, items: [{key: {{ .client.certificate | quote }}, path: kafka-client.crt}, {key: {{ .client.key | quote }}, path: kafka-client.key}]}
      {{- end }}
      {{- end }}
      {{- with index .root.Values.secrets.kms .role }}
      {{- if .name }}
      - secret: {name: {{ .name | quote }}, items: [{key: {{ .key | quote }}, path: kms}]}
      {{- end }}
      {{- end }}
{{- end }}

{{- define "sidecar.serving" -}}
ports:
  - {name: http, containerPort: {{ .Values.config.http.port }}}
startupProbe:
  httpGet: {path: /livez, port: http}
  periodSeconds: 2
  failureThreshold: 60
livenessProbe:
  httpGet: {path: /livez, port: http}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /readyz, port: http}
  periodSeconds: 5
  timeoutSeconds: 5
{{- end }}

{{- define "sidecar.placement" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* The key file of `file:`, for those whose KMS identity is the data plane's. A mounted secret is readable for its group, which the
     key file's check refuses: a private copy, in memory. */}}
{{- define "sidecar.key.init" -}}
{{- if .Values.secrets.kmsKey.name }}
initContainers:
  - name: key
    {{- include "sidecar.container" . | nindent 4 }}
    command: [sh, -c, "umask 077 && cp /run/secrets/kms/kek /run/sidecar/keys/kek"]
    resources:
      {{- toYaml .Values.migration.resources | nindent 6 }}
    volumeMounts:
      - {name: kms, mountPath: /run/secrets/kms, readOnly: true}
      - {name: keys, mountPath: /run/sidecar/keys}
{{- end }}
{{- end }}

{{- define "sidecar.key.mount" -}}
{{- if .Values.secrets.kmsKey.name }}
- {name: keys, mountPath: /run/sidecar/keys, readOnly: true}
{{- end }}
{{- end }}

{{- define "sidecar.key.volumes" -}}
{{- with .Values.secrets.kmsKey }}
{{- if .name }}
- name: kms
  secret: {secretName: {{ .name | quote }}, defaultMode: 0440, items: [{key: {{ .key | quote }}, path: kek}]}
- name: keys
  emptyDir: {medium: Memory, sizeLimit: 1Mi}
{{- end }}
{{- end }}
{{- end }}
