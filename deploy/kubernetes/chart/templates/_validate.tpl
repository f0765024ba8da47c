{{- /* Rules between values, beyond values.schema.json: each fails with a sentence. */ -}}
{{- define "tandem.validate" -}}
{{- $groups := (include "tandem.groups" . | fromJson).groups -}}
{{- $kind := .Values.workers.kind -}}
{{- $names := list -}}
{{- $roles := list -}}
{{- range $groups -}}
{{- if has .name $names -}}
{{- fail (printf "workers.groups: two groups have the name '%s'; give each its own" .name) -}}
{{- end -}}
{{- if has .name (list "router" "control" "controller") -}}
{{- fail (printf "workers.groups: '%s' is the name of another object of this release; choose another one" .name) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- $roles = append $roles .role -}}
{{- $name := .name -}}
{{- $transport := .instance.transport -}}
{{- $engine := default dict .instance.engine -}}
{{- $ranks := mul (default 1 $engine.tp) (default 1 $engine.pp) -}}
{{- $device := default "auto" $engine.device -}}
{{- if and (gt (int .gpus) 0) (ne (int .gpus) (int $ranks)) -}}
{{- fail (printf "workers.groups: '%s' has %d ranks (instance.engine.tp x pp) and %d GPUs; set gpus to %d" .name $ranks (int .gpus) $ranks) -}}
{{- end -}}
{{- if and (hasPrefix "cuda" $device) (eq (int .gpus) 0) -}}
{{- fail (printf "workers.groups: '%s' computes on %s and gets no GPU; set gpus to %d" .name $device $ranks) -}}
{{- end -}}
{{- with .ranksPerPod -}}
{{- $sum := 0 -}}
{{- range . -}}
{{- $sum = add $sum . -}}
{{- end -}}
{{- if ne (int $sum) (int $ranks) -}}
{{- fail (printf "workers.groups: '%s' has %d ranks (instance.engine.tp x pp), and its ranksPerPod has %d; let it have %d" $name $ranks $sum $ranks) -}}
{{- end -}}
{{- if gt (len (rest . | uniq)) 1 -}}
{{- fail (printf "workers.groups: '%s' has other ranksPerPod in each pod, %s; all pods but the first need the same number" $name (toJson .)) -}}
{{- end -}}
{{- if and (gt (len (uniq .)) 1) (eq $kind "RayCluster") -}}
{{- fail (printf "workers.groups: '%s' has other ranksPerPod in each pod, %s; all pods of a group of a RayCluster are alike" $name (toJson .)) -}}
{{- end -}}
{{- if and (gt (len .) 1) (has $kind (list "Deployment" "Controller")) -}}
{{- fail (printf "workers.groups: '%s' has instances of %d pods, and those of a %s have one; set workers.kind to LeaderWorkerSet or RayCluster" $name (len .) $kind) -}}
{{- end -}}
{{- if and (gt (len .) 1) (eq (default "auto" $transport) "shared_memory") -}}
{{- fail (printf "workers.groups: '%s' has instances of %d pods, whose KV others cannot reach by shared_memory; leave out instance.transport" $name (len .)) -}}
{{- end -}}
{{- end -}}
{{- if and (eq (int .rollout.maxSurge) 0) (eq (int .rollout.maxUnavailable) 0) -}}
{{- fail (printf "workers.groups: '%s' could never be updated, since rollout.maxSurge and rollout.maxUnavailable are both 0; set one to 1" .name) -}}
{{- end -}}
{{- if and .autoscaling.enabled (not $.Values.monitoring.prometheusAddress) -}}
{{- fail (printf "workers.groups: '%s' is scaled by metrics, and there is no monitoring.prometheusAddress; set it, such as http://prometheus.monitoring:9090" .name) -}}
{{- end -}}
{{- if and .autoscaling.enabled (gt (int .autoscaling.minReplicas) (int .autoscaling.maxReplicas)) -}}
{{- fail (printf "workers.groups: '%s' has autoscaling.minReplicas %d above maxReplicas %d" .name (int .autoscaling.minReplicas) (int .autoscaling.maxReplicas)) -}}
{{- end -}}
{{- end -}}
{{- if has $kind (list "RayCluster" "Controller") -}}
{{- range $groups -}}
{{- if .autoscaling.enabled -}}
{{- fail (printf "workers.groups: '%s' is scaled by KEDA, which cannot scale a group of a %s; set autoscaling.enabled to false, or another workers.kind" .name $kind) -}}
{{- end -}}
{{- if not .replicas -}}
{{- fail (printf "workers.groups: '%s' has no replicas; leave the group out of a %s" .name $kind) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if eq $kind "RayCluster" -}}
{{- range $groups -}}
{{- range .extraEnv -}}
{{- if has .name (list "RAY_REDIS_ADDRESS" "REDIS_PASSWORD" "RAY_enable_autoscaler_v2") -}}
{{- fail (printf "workers.groups: the variable %s is KubeRay's to set; leave it out of extraEnv" .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if not (regexMatch "^[0-9]+[.][0-9]+[.][0-9]+" .Values.workers.ray.version) -}}
{{- fail (printf "workers.ray.version is '%s'; give the version of the Ray in the image, such as 2.60.0" .Values.workers.ray.version) -}}
{{- end -}}
{{- end -}}
{{- if and (has $kind (list "RayCluster" "LeaderWorkerSet")) (not (regexMatch "^[a-z]" (include "tandem.fullname" .))) -}}
{{- fail (printf "the name %s of the %s does not begin with a letter; set fullnameOverride" (include "tandem.fullname" .) $kind) -}}
{{- end -}}
{{- if ne (has "prefill" $roles) (has "decode" $roles) -}}
{{- fail (printf "workers.groups: there is no %s group; prefill and decode groups need each other" (ternary "decode" "prefill" (has "prefill" $roles))) -}}
{{- end -}}
{{- $autoscaling := .Values.router.autoscaling -}}
{{- if and $autoscaling.enabled (not .Values.monitoring.prometheusAddress) -}}
{{- fail "router.autoscaling is enabled, and there is no monitoring.prometheusAddress; set it, such as http://prometheus.monitoring:9090" -}}
{{- end -}}
{{- if and $autoscaling.enabled (gt (int $autoscaling.minReplicas) (int $autoscaling.maxReplicas)) -}}
{{- fail (printf "router.autoscaling.minReplicas is %d, above maxReplicas %d" (int $autoscaling.minReplicas) (int $autoscaling.maxReplicas)) -}}
{{- end -}}
{{- with .Values.apiKeys -}}
{{- if and .clientKey (not .existingSecret) -}}
{{- fail "apiKeys.clientKey is a key of the Secret apiKeys.existingSecret, which is not set" -}}
{{- end -}}
{{- if and .existingSecret (not .clientKey) $.Values.monitoring.serviceMonitor.enabled (not $.Values.router.settings.open_metrics) -}}
{{- fail "with API keys Prometheus needs one: set apiKeys.clientKey, or router.settings.open_metrics to true" -}}
{{- end -}}
{{- end -}}
{{- if and .Values.tls.publicSecret (not .Values.tls.publicName) -}}
{{- fail "tls.publicName is not set; it is a name that the certificate of tls.publicSecret has" -}}
{{- end -}}
{{- $model := .Values.model -}}
{{- if and (eq $model.source "persistentVolumeClaim") (not $model.persistentVolumeClaim) -}}
{{- fail "model.source is persistentVolumeClaim; name the claim with model.persistentVolumeClaim" -}}
{{- end -}}
{{- if and (eq $model.source "hostPath") (not $model.hostPath) -}}
{{- fail "model.source is hostPath; name the folder of the nodes with model.hostPath" -}}
{{- end -}}
{{- if and (eq $model.source "download") (not $model.download.repository) -}}
{{- fail "model.source is download; name the repository with model.download.repository, such as Qwen/Qwen3-8B" -}}
{{- end -}}
{{- end -}}
