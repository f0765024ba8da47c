{{- /*
Pods of a RayCluster. KubeRay adds the command that starts Ray, /dev/shm, and the wait for the head; probes are ours, since its
own need wget in the image.
*/ -}}

{{- /* What `tandem up --ray` reads. */ -}}
{{- define "tandem.raySettings" -}}
{{- mergeOverwrite (include "tandem.commonSettings" . | fromJson) (include "tandem.modelHash" . | fromJson) (include "tandem.kinds" . | fromJson) (dict
  "start_router" false
  "controller" "127.0.0.1:8003"
  "load_timeout_s" .Values.workers.loadSeconds
) | toYaml -}}
{{- end -}}

{{- /* Ray's name for a pod of a group, which has room for one instance, or for the ranks of one. */ -}}
{{- define "tandem.rayResource" -}}
tandem-{{ .name }}
{{- end -}}

{{- define "tandem.rayEnvironment" -}}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: RAY_memory_monitor_refresh_ms, value: "0"}  # it would end instances when the node is short of memory
- {name: RAY_worker_niceness, value: "0"}  # else instances would have a low priority
- {name: RAY_worker_oom_score_adjustment, value: "0"}
{{- end -}}

{{- /* Takes the port that is open as long as this part of Ray lives. */ -}}
{{- define "tandem.rayProbes" -}}
readinessProbe:
  tcpSocket: {port: {{ . }}}
  periodSeconds: 5
livenessProbe:
  tcpSocket: {port: {{ . }}}
  initialDelaySeconds: 60
  periodSeconds: 10
  failureThreshold: 6
{{- end -}}

{{- /* A PodTemplateSpec. The head runs no instance; the controller is an actor of Ray on it. */ -}}
{{- define "tandem.rayHeadPod" -}}
{{- $workers := .Values.workers -}}
{{- $labels := printf "%s\napp.kubernetes.io/component: controller" (include "tandem.selectorLabels" .) -}}
metadata:
  labels:
    {{- include "tandem.labels" . | nindent 4 }}
    app.kubernetes.io/component: controller
  annotations:
    ray.io/overwrite-container-cmd: "true"
    tandem.serve/settings: {{ include "tandem.raySettings" . | quote }}
    {{- with $workers.ray.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  terminationGracePeriodSeconds: {{ add $workers.drainSeconds 30 }}
  {{- include "tandem.scheduling" (dict "root" . "section" $workers.ray "labels" $labels) | nindent 2 }}
  {{- include "tandem.initContainers" (dict "root" .) | nindent 2 }}
  containers:
    - name: ray-head
      image: {{ include "tandem.image" . }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      command: [/bin/bash, -c]
      args:
        - |
          ulimit -n 65536
          eval "$KUBERAY_GEN_RAY_START_CMD" &
          ray=$!
          until tandem up /etc/tandem/settings.yaml --ray auto --no-wait --grace {{ $workers.drainSeconds }}; do
            kill -0 $ray || exit 1
            sleep 2
          done
          wait $ray
      env:
        {{- include "tandem.rayEnvironment" . | nindent 8 }}
        {{- with $workers.ray.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        - {name: gcs-server, containerPort: 6379}
        - {name: controller, containerPort: 8003}
      {{- include "tandem.rayProbes" 6379 | nindent 6 }}
      lifecycle:
        preStop:
          exec: {command: [tandem, down, --grace, {{ $workers.drainSeconds | quote }}]}
      resources: {{- toYaml $workers.ray.resources | nindent 8 }}
      securityContext: {{- include "tandem.containerSecurity" list | nindent 8 }}
      volumeMounts: {{- include "tandem.volumeMounts" . | nindent 8 }}
  volumes: {{- include "tandem.volumes" . | nindent 4 }}
{{- end -}}

{{- /* A PodTemplateSpec; takes root and group (with its defaults). */ -}}
{{- define "tandem.rayWorkerPod" -}}
{{- $root := .root -}}
{{- $group := include "tandem.groupOfPod" (dict "group" .group "pod" 0) | fromJson -}}{{- /* all its pods are alike */ -}}
metadata:
  labels:
    {{- include "tandem.labels" $root | nindent 4 }}
    app.kubernetes.io/component: worker
    tandem.serve/group: {{ $group.name }}
    tandem.serve/role: {{ $group.role }}
  {{- with $group.podAnnotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- include "tandem.scheduling" (dict "root" $root "section" $group "labels" (include "tandem.workerLabels" .)) | nindent 2 }}
  {{- include "tandem.initContainers" (dict "root" $root) | nindent 2 }}
  containers:
    - name: ray-worker
      image: {{ include "tandem.image" $root }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      env:
        {{- include "tandem.rayEnvironment" $root | nindent 8 }}
        {{- with $group.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- include "tandem.rayProbes" 6380 | nindent 6 }}
      resources:
        {{- include "tandem.workerResources" $group | nindent 8 }}
      securityContext: {{- include "tandem.containerSecurity" (ternary (list "IPC_LOCK") list (ne $group.rdma.resource "")) | nindent 8 }}
      volumeMounts: {{- include "tandem.volumeMounts" $root | nindent 8 }}
  volumes: {{- include "tandem.volumes" $root | nindent 4 }}
{{- end -}}
