{{- define "tandem.workerLabels" -}}
{{ include "tandem.selectorLabels" .root }}
app.kubernetes.io/component: worker
tandem.serve/group: {{ .group.name }}
{{- end -}}

{{- /* Whole CPUs that the pod of a group requests, at least one. */ -}}
{{- define "tandem.cores" -}}
{{- $cpu := toString (default 1 .resources.requests.cpu) -}}
{{- max 1 (hasSuffix "m" $cpu | ternary (div (trimSuffix "m" $cpu | int) 1000) (int (float64 $cpu))) -}}
{{- end -}}

{{- /* The settings of a group's instances, as JSON. Without a number of threads one would take all cores of the node. */ -}}
{{- define "tandem.instance" -}}
{{- $instance := deepCopy .instance -}}
{{- $engine := default dict $instance.engine -}}
{{- if not $engine.threads -}}
{{- $cores := include "tandem.cores" . | int -}}
{{- $instance = merge (dict "engine" (mergeOverwrite (deepCopy $engine) (dict "threads" $cores))) $instance -}}
{{- end -}}
{{- $instance | toJson -}}
{{- end -}}

{{- /* Of workers only: a router reads no weights. As JSON. */ -}}
{{- define "tandem.modelHash" -}}
{{- $settings := dict -}}
{{- with .Values.model.hash -}}
{{- $_ := set $settings "model_hash" . -}}
{{- end -}}
{{- $settings | toJson -}}
{{- end -}}

{{- /* What `tandem worker` reads. */ -}}
{{- define "tandem.workerSettings" -}}
{{- $root := .root -}}
{{- merge (include "tandem.commonSettings" $root | fromJson) (include "tandem.modelHash" $root | fromJson) (dict
  "role" .group.role
  "name" .group.name
  "routers" (list (printf "%s-control.%s.svc:8002" (include "tandem.fullname" $root) $root.Release.Namespace))
  "plan_epoch" (include "tandem.planEpoch" $root)
  "instance" (include "tandem.instance" .group | fromJson)
) | toYaml -}}
{{- end -}}

{{- /*
Takes root and service, one of gRPC's health service. Kubernetes asks it without TLS only; where the port has TLS, probes
look whether it is open: it is open once the model is loaded, and the process ends a hung step itself.
*/ -}}
{{- define "tandem.workerProbe" -}}
{{- if .root.Values.tls.clusterSecret -}}
tcpSocket: {port: 8003}
{{- else -}}
grpc: {port: 8003{{ with .service }}, service: {{ . }}{{ end }}}
{{- end -}}
{{- end -}}

{{- /* Takes a group. */ -}}
{{- define "tandem.workerResources" -}}
requests:
  {{- toYaml .resources.requests | nindent 2 }}
limits:
  {{- toYaml .resources.limits | nindent 2 }}
  {{- if .gpus }}
  {{ .gpuResource }}: {{ .gpus }}
  {{- end }}
  {{- if .rdma.resource }}
  {{ .rdma.resource }}: {{ .rdma.count }}
  {{- end }}
{{- end -}}

{{- /* A PodTemplateSpec; takes root and group (with its defaults). */ -}}
{{- define "tandem.workerPod" -}}
{{- $root := .root -}}
{{- $group := .group -}}
{{- $workers := $root.Values.workers -}}
metadata:
  labels:
    {{- include "tandem.labels" $root | nindent 4 }}
    app.kubernetes.io/component: worker
    tandem.serve/group: {{ $group.name }}
    tandem.serve/role: {{ $group.role }}
    tandem.serve/plan-epoch: {{ include "tandem.planEpoch" $root | quote }}
  annotations:
    tandem.serve/settings: {{ include "tandem.workerSettings" . | quote }}
    {{- with $group.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  terminationGracePeriodSeconds: {{ add $workers.drainSeconds 15 }}
  {{- include "tandem.scheduling" (dict "root" $root "section" $group "labels" (include "tandem.workerLabels" .)) | nindent 2 }}
  {{- include "tandem.initContainers" (dict "root" $root) | nindent 2 }}
  containers:
    - name: worker
      image: {{ include "tandem.image" $root }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      args: [worker, /etc/tandem/settings.yaml, --grace, {{ $workers.drainSeconds | quote }}, --set, "listen=$(POD_IP):8003"]
      env:
        - {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
        {{- with $group.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        - {name: worker, containerPort: 8003}
      startupProbe:
        {{- include "tandem.workerProbe" (dict "root" $root) | nindent 8 }}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: {{ div (add $workers.loadSeconds 4) 5 }}
      readinessProbe:
        {{- include "tandem.workerProbe" (dict "root" $root) | nindent 8 }}
        periodSeconds: 5
        timeoutSeconds: 5
      livenessProbe:  # a stalled step is none of its business: the process ends a hung step itself
        {{- include "tandem.workerProbe" (dict "root" $root "service" "liveness") | nindent 8 }}
        periodSeconds: 10
        timeoutSeconds: 10
        failureThreshold: 6
      resources:
        {{- include "tandem.workerResources" $group | nindent 8 }}
      securityContext: {{- include "tandem.containerSecurity" (ternary (list "IPC_LOCK") list (ne $group.rdma.resource "")) | nindent 8 }}
      volumeMounts:
        {{- include "tandem.volumeMounts" $root | nindent 8 }}
        - {name: shm, mountPath: /dev/shm}
  volumes:
    {{- include "tandem.volumes" $root | nindent 4 }}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $group.shmSize }}}
{{- end -}}
