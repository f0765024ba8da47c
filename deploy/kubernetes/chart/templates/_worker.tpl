{{- define "tandem.workerLabels" -}}
{{ include "tandem.selectorLabels" .root }}
app.kubernetes.io/component: worker
tandem.serve/group: {{ .group.name }}
{{- end -}}

{{- /* What `tandem worker` reads. Without a number of threads an instance would take all cores of the node. */ -}}
{{- define "tandem.workerSettings" -}}
{{- $root := .root -}}
{{- $cpu := toString (default 1 .group.resources.requests.cpu) -}}
{{- $cores := hasSuffix "m" $cpu | ternary (div (trimSuffix "m" $cpu | int) 1000) (int (float64 $cpu)) -}}
{{- $instance := deepCopy .group.instance -}}
{{- $engine := default dict $instance.engine -}}
{{- if not $engine.threads -}}
{{- $instance = merge (dict "engine" (mergeOverwrite (deepCopy $engine) (dict "threads" (max 1 $cores)))) $instance -}}
{{- end -}}
{{- merge (include "tandem.commonSettings" $root | fromJson) (dict
  "role" .group.role
  "name" .group.name
  "routers" (list (printf "%s-control.%s.svc:8002" (include "tandem.fullname" $root) $root.Release.Namespace))
  "plan_epoch" (include "tandem.planEpoch" $root)
  "instance" $instance
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
        requests:
          {{- toYaml $group.resources.requests | nindent 10 }}
        limits:
          {{- toYaml $group.resources.limits | nindent 10 }}
          {{- if $group.gpus }}
          {{ $group.gpuResource }}: {{ $group.gpus }}
          {{- end }}
          {{- if $group.rdma.resource }}
          {{ $group.rdma.resource }}: {{ $group.rdma.count }}
          {{- end }}
      securityContext: {{- include "tandem.containerSecurity" (ternary (list "IPC_LOCK") list (ne $group.rdma.resource "")) | nindent 8 }}
      volumeMounts:
        {{- include "tandem.volumeMounts" $root | nindent 8 }}
        - {name: shm, mountPath: /dev/shm}
  volumes:
    {{- include "tandem.volumes" $root | nindent 4 }}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $group.shmSize }}}
{{- end -}}
