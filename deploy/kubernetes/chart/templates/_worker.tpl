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

{{- /* Empty unless the instances of a group have several pods. */ -}}
{{- define "tandem.hasRanksPods" -}}
{{- if gt (len .ranksPerPod) 1 }}true{{ end -}}
{{- end -}}

{{- /* A group as the pod of this number within an instance has it, as JSON: with the GPUs of its ranks. Takes group and pod. */ -}}
{{- define "tandem.groupOfPod" -}}
{{- $group := .group -}}
{{- if and $group.gpus (include "tandem.hasRanksPods" $group) -}}
{{- $group = merge (dict "gpus" (index $group.ranksPerPod .pod)) $group -}}
{{- end -}}
{{- $group | toJson -}}
{{- end -}}

{{- /* Threads of an instance of a group: each of its ranks has its part of its pod's cores. */ -}}
{{- define "tandem.threads" -}}
{{- $threads := include "tandem.cores" . | int -}}
{{- if include "tandem.hasRanksPods" . -}}
{{- $ranks := 0 -}}
{{- $most := 0 -}}
{{- range .ranksPerPod -}}
{{- $ranks = add $ranks . -}}
{{- $most = max $most . -}}
{{- end -}}
{{- $threads = mul $ranks (max 1 (div $threads $most)) -}}
{{- end -}}
{{- $threads -}}
{{- end -}}

{{- /* The settings of a group's instances, as JSON. Without a number of threads one would take all cores of the node. */ -}}
{{- define "tandem.instance" -}}
{{- $instance := deepCopy .instance -}}
{{- $engine := default dict $instance.engine -}}
{{- if not $engine.threads -}}
{{- $threads := include "tandem.threads" . | int -}}
{{- $instance = merge (dict "engine" (mergeOverwrite (deepCopy $engine) (dict "threads" $threads))) $instance -}}
{{- end -}}
{{- $instance | toJson -}}
{{- end -}}

{{- /*
What a controller of Tandem starts, as JSON: groups of one role are kinds of instances. On Ray each is tied to the pods of
its group by a resource. Tandem's controller makes the pods of the group, and takes the number of threads from there.
*/ -}}
{{- define "tandem.kinds" -}}
{{- $kinds := dict "prefill" list "decode" list "colocated" list -}}
{{- $onRay := eq .Values.workers.kind "RayCluster" -}}
{{- range (include "tandem.groups" . | fromJson).groups -}}
{{- $instance := ternary (include "tandem.instance" . | fromJson) (deepCopy .instance) $onRay -}}
{{- $_ := set $instance "instances" .replicas -}}
{{- if $onRay -}}
{{- $_ := set $instance "ray_resources" (dict (include "tandem.rayResource" .) 1) -}}
{{- else if ne .name .role -}}
{{- $_ := set $instance "pod_group" .name -}}
{{- end -}}
{{- $engine := default dict $instance.engine -}}
{{- if and .gpus (not $engine.device) -}}{{- /* the controller has no GPU to see */ -}}
{{- $_ := set $instance "engine" (merge (dict "device" "cuda") $engine) -}}
{{- end -}}
{{- $_ := set $kinds .role (append (get $kinds .role) $instance) -}}
{{- end -}}
{{- range $role, $kind := $kinds -}}
{{- if not $kind -}}
{{- $_ := unset $kinds $role -}}
{{- end -}}
{{- end -}}
{{- $kinds | toJson -}}
{{- end -}}

{{- /* Of workers only: a router reads no weights. As JSON. */ -}}
{{- define "tandem.modelHash" -}}
{{- $settings := dict -}}
{{- with .Values.model.hash -}}
{{- $_ := set $settings "model_hash" . -}}
{{- end -}}
{{- $settings | toJson -}}
{{- end -}}

{{- /* What `tandem worker` and `tandem ranks` read. */ -}}
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

{{- /*
The arguments of a pod, as JSON; takes root, group and pod, its number within the instance. Pod 0 has rank 0, which waits
for the ranks of the other pods; these find it by the name that LeaderWorkerSet gives pod 0. After SIGTERM they have more
time: rank 0 may get its own later, and ends them when its requests have ended.
*/ -}}
{{- define "tandem.workerArguments" -}}
{{- $grace := add .root.Values.workers.drainSeconds (ternary 0 10 (eq .pod 0)) -}}
{{- $arguments := list (ternary "worker" "ranks" (eq .pod 0)) "/etc/tandem/settings.yaml" "--grace" (toString $grace) -}}
{{- if eq .pod 0 -}}
{{- $arguments = concat $arguments (list "--set" "listen=$(POD_IP):8003") -}}
{{- end -}}
{{- if include "tandem.hasRanksPods" .group -}}
{{- $arguments = concat $arguments (list
  "--set" (printf "ranks.listen=%s:8004" (ternary "$(POD_IP)" "$(LWS_LEADER_ADDRESS)" (eq .pod 0)))
  "--set" (printf "ranks.per_host=%s" (toJson .group.ranksPerPod))
) -}}
{{- end -}}
{{- $arguments | toJson -}}
{{- end -}}

{{- /*
Of a pod with rank 0. The other pods of an instance need none: Kubernetes sees the end of `tandem ranks`, and rank 0 ends the
instance when one of its ranks answers no more. They are Ready before it, so an instance is Ready when pod 0 is.
*/ -}}
{{- define "tandem.workerProbes" -}}
startupProbe:
  {{- include "tandem.workerProbe" (dict "root" .) | nindent 2 }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ div (add .Values.workers.loadSeconds 4) 5 }}
readinessProbe:
  {{- include "tandem.workerProbe" (dict "root" .) | nindent 2 }}
  periodSeconds: 5
  timeoutSeconds: 5
livenessProbe:  # a stalled step is none of its business: the process ends a hung step itself
  {{- include "tandem.workerProbe" (dict "root" . "service" "liveness") | nindent 2 }}
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 6
{{- end -}}

{{- /* Takes a group, as `tandem.groupOfPod` gives it. */ -}}
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

{{- /* A PodTemplateSpec; takes root, group (with its defaults), and pod, its number within an instance of several pods. */ -}}
{{- define "tandem.workerPod" -}}
{{- $root := .root -}}
{{- $group := .group -}}
{{- $pod := default 0 .pod -}}
{{- $workers := $root.Values.workers -}}
{{- $hasRanksPods := include "tandem.hasRanksPods" $group -}}
{{- $environment := $group.extraEnv -}}
{{- if eq $pod 0 -}}
{{- $ip := dict "name" "POD_IP" "valueFrom" (dict "fieldRef" (dict "fieldPath" "status.podIP")) -}}
{{- $environment = prepend $environment $ip -}}
{{- end -}}
metadata:
  labels:
    {{- include "tandem.labels" $root | nindent 4 }}
    app.kubernetes.io/component: worker
    tandem.serve/group: {{ $group.name }}
    {{- if ne $workers.kind "Controller" }}
    tandem.serve/role: {{ $group.role }}
    tandem.serve/plan-epoch: {{ include "tandem.planEpoch" $root | quote }}
    {{- end }}
  {{- if ne $workers.kind "Controller" }}
  annotations:
    tandem.serve/settings: {{ include "tandem.workerSettings" . | quote }}
    {{- with $group.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- else }}
  annotations: {{- toYaml $group.podAnnotations | nindent 4 }}
  {{- end }}
spec:
  terminationGracePeriodSeconds: {{ add $workers.drainSeconds (ternary 15 25 (eq $pod 0)) }}
  {{- include "tandem.scheduling" (dict "root" $root "section" $group "labels" (include "tandem.workerLabels" .)) | nindent 2 }}
  {{- include "tandem.initContainers" (dict "root" $root) | nindent 2 }}
  containers:
    - name: {{ ternary "worker" "ranks" (eq $pod 0) }}
      image: {{ include "tandem.image" $root }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      args: {{ include "tandem.workerArguments" (dict "root" $root "group" $group "pod" $pod) }}
      {{- with $environment }}
      env: {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- if eq $pod 0 }}
      ports:
        - {name: worker, containerPort: 8003}
        {{- if $hasRanksPods }}
        - {name: ranks, containerPort: 8004}
        {{- end }}
      {{- include "tandem.workerProbes" $root | nindent 6 }}
      {{- end }}
      resources:
        {{- include "tandem.workerResources" (include "tandem.groupOfPod" (dict "group" $group "pod" $pod) | fromJson) | nindent 8 }}
      securityContext: {{- include "tandem.containerSecurity" (ternary (list "IPC_LOCK") list (ne $group.rdma.resource "")) | nindent 8 }}
      volumeMounts:
        {{- include "tandem.volumeMounts" $root | nindent 8 }}
        - {name: shm, mountPath: /dev/shm}
  volumes:
    {{- include "tandem.volumes" $root | nindent 4 }}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $group.shmSize }}}
{{- end -}}
