{{- define "tandem.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 36 | trimSuffix "-" -}}
{{- end -}}

{{- define "tandem.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 36 | trimSuffix "-" -}}
{{- else if contains (include "tandem.name" .) .Release.Name -}}
{{- .Release.Name | trunc 36 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "tandem.name" .) | trunc 36 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- /* Of every pod and every object; selectors use them without the version. */ -}}
{{- define "tandem.selectorLabels" -}}
app.kubernetes.io/name: {{ include "tandem.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "tandem.labels" -}}
{{ include "tandem.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: tandem
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "tandem.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}
{{ printf "%s@%s" $image.repository $image.digest }}
{{- else -}}
{{ printf "%s:%s" $image.repository (default .Chart.AppVersion $image.tag) }}
{{- end -}}
{{- end -}}

{{- define "tandem.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "tandem.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- /* The controller's, which alone uses the API of Kubernetes. */ -}}
{{- define "tandem.controllerAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- include "tandem.fullname" . }}-controller
{{- else -}}
{{- include "tandem.serviceAccount" . -}}
{{- end -}}
{{- end -}}

{{- define "tandem.tokenSecret" -}}
{{- default (printf "%s-token" (include "tandem.fullname" .)) .Values.clusterToken.existingSecret -}}
{{- end -}}

{{- /* The groups of workers, with the defaults in the place of what they lack, as JSON of {groups: [...]}. */ -}}
{{- define "tandem.groups" -}}
{{- $groups := list -}}
{{- range .Values.workers.groups -}}
{{- $groups = append $groups (mustMergeOverwrite (deepCopy $.Values.workers.defaults) .) -}}
{{- end -}}
{{- dict "groups" $groups | toJson -}}
{{- end -}}

{{- /* Equal for instances that may exchange KV. Another number of replicas, or other nodes, do not change it. */ -}}
{{- define "tandem.planEpoch" -}}
{{- if eq .Values.workers.kind "Controller" -}}
{{- $pods := list -}}
{{- range include "tandem.podGroups" . | fromJsonArray -}}
{{- $pods = append $pods .template -}}
{{- end -}}
{{- $pods = $pods | toJson | sha256sum | trunc 10 -}}{{- /* settings: the controller compares them itself */ -}}
{{- with .Values.planEpoch }}{{ . }}-{{ end }}{{ $pods -}}
{{- else if .Values.planEpoch -}}
{{- .Values.planEpoch -}}
{{- else -}}
{{- $parts := list (include "tandem.image" .) .Values.model -}}
{{- range (include "tandem.groups" . | fromJson).groups -}}
{{- $parts = append $parts (list .name .role .instance) -}}
{{- end -}}
{{- $parts | toJson | sha256sum | trunc 10 -}}
{{- end -}}
{{- end -}}

{{- define "tandem.modelPath" -}}
{{- $model := .Values.model -}}
{{- if eq $model.source "builtIn" -}}
/opt/tandem/models/tiny-python
{{- else if eq $model.source "download" -}}
/models/checkpoint
{{- else -}}
/models{{ with trimAll "/" $model.path }}/{{ . }}{{ end }}
{{- end -}}
{{- end -}}

{{- define "tandem.modelName" -}}
{{- $model := .Values.model -}}
{{- if $model.name -}}
{{- $model.name -}}
{{- else if eq $model.source "download" -}}
{{- $model.download.repository | base -}}
{{- else -}}
{{- include "tandem.modelPath" . | base -}}
{{- end -}}
{{- end -}}
