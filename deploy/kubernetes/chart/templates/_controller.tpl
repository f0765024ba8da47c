{{- /* Tandem's controller as a Deployment: what `tandem controller` reads. */ -}}
{{- define "tandem.controllerSettings" -}}
{{- $name := include "tandem.fullname" . -}}
{{- $namespace := .Release.Namespace -}}
{{- $router := mustMergeOverwrite (dict "allow_anonymous" true) (deepCopy .Values.router.settings) (dict
  "http" (printf "%s.%s.svc:8000" $name $namespace)
  "grpc" (printf "%s.%s.svc:8001" $name $namespace)
  "control" (printf "%s-control.%s.svc:8002" $name $namespace)
) -}}
{{- mergeOverwrite (include "tandem.commonSettings" . | fromJson) (include "tandem.modelHash" . | fromJson) (include "tandem.kinds" . | fromJson) (dict
  "router" $router
  "start_router" false
  "controller" "0.0.0.0:8003"
  "load_timeout_s" .Values.workers.loadSeconds
) | toYaml -}}
{{- end -}}

{{- /* The groups of pods that it makes, as JSON. Settings are not in them: the controller gives each pod its own. */ -}}
{{- define "tandem.podGroups" -}}
{{- $root := . -}}
{{- $groups := list -}}
{{- range (include "tandem.groups" . | fromJson).groups -}}
{{- $groups = append $groups (dict
  "name" .name
  "role" .role
  "gpu_resource" .gpuResource
  "starts_first" (gt (int .rollout.maxSurge) 0)
  "threads" (include "tandem.cores" . | int)
  "template" (include "tandem.workerPod" (dict "root" $root "group" .) | fromYaml)
) -}}
{{- end -}}
{{- $groups | toJson -}}
{{- end -}}

{{- define "tandem.controllerPods" -}}
{{- $name := include "tandem.fullname" . -}}
{{- dict
  "cluster" $name
  "config_map" (printf "%s-controller" $name)
  "deployment" (printf "%s-controller" $name)
  "routers" (list (printf "%s-control.%s.svc:8002" $name .Release.Namespace))
  "plan_epoch" (include "tandem.planEpoch" .)
  "groups" (include "tandem.podGroups" . | fromJsonArray)
| toYaml -}}
{{- end -}}

{{- define "tandem.controllerProbe" -}}
{{- if .Values.tls.clusterSecret -}}
tcpSocket: {port: 8003}
{{- else -}}
grpc: {port: 8003}
{{- end -}}
{{- end -}}
