{{- /*
What routers and workers have in common. The settings of a process are an annotation of its pod, which the pod reads as a
file: so a pod keeps the settings of its own revision during an update, and a change of settings makes a new revision.
*/ -}}

{{- define "tandem.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- /* Takes capabilities to add. */ -}}
{{- define "tandem.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
  {{- with . }}
  add: {{ toJson . }}
  {{- end }}
{{- end -}}

{{- define "tandem.volumeMounts" -}}
- {name: settings, mountPath: /etc/tandem, readOnly: true}
- {name: token, mountPath: /run/secrets/tandem, readOnly: true}
- {name: scratch, mountPath: /tmp}
{{- if .Values.tls.clusterSecret }}
- {name: cluster-tls, mountPath: /run/secrets/tandem-cluster-tls, readOnly: true}
{{- end }}
{{- if ne .Values.model.source "builtIn" }}
- {name: model, mountPath: /models, readOnly: true}
{{- end }}
{{- end -}}

{{- define "tandem.volumes" -}}
- name: settings
  downwardAPI:
    items:
      - path: settings.yaml
        fieldRef: {fieldPath: "metadata.annotations['tandem.serve/settings']"}
- name: token
  secret:
    secretName: {{ include "tandem.tokenSecret" . }}
    defaultMode: 0440
    items: [{key: {{ .Values.clusterToken.key }}, path: token}]
- name: scratch
  emptyDir: {}
{{- with .Values.tls.clusterSecret }}
- name: cluster-tls
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- if eq .Values.model.source "persistentVolumeClaim" }}
- name: model
  persistentVolumeClaim: {claimName: {{ .Values.model.persistentVolumeClaim }}, readOnly: true}
{{- else if eq .Values.model.source "hostPath" }}
- name: model
  hostPath: {path: {{ .Values.model.hostPath }}, type: Directory}
{{- else if eq .Values.model.source "download" }}
- name: model
  emptyDir: {sizeLimit: {{ .Values.model.download.sizeLimit }}}
{{- end }}
{{- end -}}

{{- /* What routers and workers read in the same way; more is to be merged. */ -}}
{{- define "tandem.commonSettings" -}}
{{- $settings := dict
  "model" (include "tandem.modelPath" .)
  "model_name" (include "tandem.modelName" .)
  "cluster_token" "file:/run/secrets/tandem/token"
-}}
{{- if .Values.tls.clusterSecret -}}
{{- $folder := "/run/secrets/tandem-cluster-tls" -}}
{{- $_ := set $settings "cluster_tls" (dict
  "certificate" (printf "%s/tls.crt" $folder)
  "key" (printf "%s/tls.key" $folder)
  "ca" (printf "%s/ca.crt" $folder)
  "server_name" .Values.tls.serverName
) -}}
{{- end -}}
{{- $settings | toJson -}}
{{- end -}}

{{- /* Takes root and the arguments that say which files, all if empty. */ -}}
{{- define "tandem.initContainers" -}}
{{- $root := .root -}}
{{- $download := $root.Values.model.download -}}
{{- if eq $root.Values.model.source "download" }}
initContainers:
  - name: download
    image: {{ include "tandem.image" $root }}
    imagePullPolicy: {{ $root.Values.image.pullPolicy }}
    command: [hf, download, {{ $download.repository | quote }}, --revision, {{ $download.revision | quote }}, --local-dir, /models/checkpoint]
    {{- with .files }}
    args: {{ toJson . }}
    {{- end }}
    env:
      - {name: HOME, value: /tmp}
      - {name: HF_HOME, value: /tmp/huggingface}
      {{- if $download.tokenSecret }}
      - name: HF_TOKEN
        valueFrom: {secretKeyRef: {name: {{ $download.tokenSecret }}, key: {{ $download.tokenKey }}}}
      {{- end }}
    securityContext: {{- include "tandem.containerSecurity" list | nindent 6 }}
    resources: {requests: {cpu: "1", memory: 1Gi}, limits: {memory: 2Gi}}
    volumeMounts:
      - {name: model, mountPath: /models}
      - {name: scratch, mountPath: /tmp}
{{- end }}
{{- end -}}

{{- /* Of a checkpoint, what a router or a controller reads. */ -}}
{{- define "tandem.smallFiles" -}}
{{- list "--include" "*.json" "--include" "*.jinja" "--include" "*.model" "--include" "*.txt" | toJson -}}
{{- end -}}

{{- /* Takes root, section (of the values), labels (that all these pods have); usesApi: of Kubernetes. */ -}}
{{- define "tandem.scheduling" -}}
serviceAccountName: {{ include (ternary "tandem.controllerAccount" "tandem.serviceAccount" (default false .usesApi)) .root }}
automountServiceAccountToken: {{ default false .usesApi }}
enableServiceLinks: false
securityContext: {{- include "tandem.podSecurity" . | nindent 2 }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
{{- with .section.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .section.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .section.nodeSelector }}
nodeSelector: {{ toJson . }}
{{- end }}
{{- with .section.tolerations }}
tolerations: {{ toJson . }}
{{- end }}
{{- with .section.affinity }}
affinity: {{ toJson . }}
{{- end }}
{{- if .section.topologyKey }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: {{ .section.topologyKey }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- .labels | nindent 8 }}
{{- end }}
{{- end -}}
