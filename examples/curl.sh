#!/usr/bin/env bash
# The HTTP API with curl.  examples/curl.sh [http://HOST:PORT]
set -euo pipefail
base=${1:-http://127.0.0.1:8000}
json='Content-Type: application/json'

echo "# the models"
curl -sSf "$base/v1/models"
echo

model=$(curl -sSf "$base/v1/models" | grep -o '"id": *"[^"]*"' | head -n 1 | cut -d'"' -f4)

echo "# a completion"
curl -sSf "$base/v1/completions" -H "$json" \
  -d "{\"model\": \"$model\", \"prompt\": \"def read_json(path):\", \"max_tokens\": 32, \"temperature\": 0}"
echo

echo "# a chat, streamed"
curl -sSfN "$base/v1/chat/completions" -H "$json" \
  -d "{\"model\": \"$model\", \"messages\": [{\"role\": \"user\", \"content\": \"hello\"}], \"max_tokens\": 8, \"stream\": true}"

echo "# health"
curl -sSf "$base/health"
echo
