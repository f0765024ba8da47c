#!/usr/bin/env bash
# Puts promtool and prometheus, of Debian's package, into the folder $1. Nothing is installed.
set -euo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get download -qq prometheus 2> log || { apt-get update -qq && apt-get download -qq prometheus; } 2> log || { cat log >&2; exit 1; }
dpkg-deb -x prometheus_*.deb package
mv package/usr/bin/prometheus package/usr/bin/promtool "$folder"
