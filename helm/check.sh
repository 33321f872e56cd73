#!/usr/bin/env bash
# The chart: lint, render with every values file, validate what was rendered, load the configuration in it.
# Each check is also seen red. Takes some seconds; the first time helm may have to be built (some minutes).
set -euo pipefail
cd "$(dirname "$0")/.."

HELM_VERSION=v3.21.4
BIN=$PWD/.venv/bin
KUBERNETES=1.33.0        # what is told to the chart; the documents are validated against the validator's own version
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/sidecar/helm-$HELM_VERSION

fail() { echo "helm-check: $*" >&2; exit 1; }

if command -v helm >/dev/null && [[ $(helm version --short 2>/dev/null) == v3.* ]]; then
  HELM=helm
else
  HELM=$CACHE/helm
  if [ ! -x "$HELM" ]; then
    command -v go >/dev/null || fail "helm 3 is missing, and Go to build it. Install one of them: https://helm.sh/docs/intro/install or https://go.dev/doc/install"
    echo "building helm $HELM_VERSION (about 4 minutes, once)" >&2
    mkdir -p "$CACHE"
    GOBIN=$CACHE go install "helm.sh/helm/v3/cmd/helm@$HELM_VERSION" 2>"$CACHE/build.log" || fail "helm could not be built: see $CACHE/build.log"
  fi
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
render() { "$HELM" template trial helm --namespace trial --kube-version "$KUBERNETES" "$@"; }
validate() { "$BIN/kubernetes-validate" --strict --quiet "$1"; }
# A control: what follows the description must fail, and say so in the words of the pattern.
must_fail() {
  local what=$1 pattern=$2
  shift 2
  if "$@" >"$work/control" 2>&1; then fail "control: $what was not noticed"; fi
  grep -qi -- "$pattern" "$work/control" || { cat "$work/control" >&2; fail "control: $what failed for another reason"; }
}

for values in /dev/null helm/ci/*.yaml; do
  name=$(basename "$values" .yaml)
  [ "$values" != /dev/null ] || name=default
  "$HELM" lint --strict --quiet helm --values "$values" >"$work/lint" || { cat "$work/lint" >&2; fail "lint with $name"; }
  render --values "$values" >"$work/$name.yaml" || fail "template with $name"
  validate "$work/$name.yaml" || fail "kubernetes-validate with $name"
  "$BIN/python" helm/check.py pods "$work/$name.yaml" || fail "pods with $name"
  "$BIN/python" helm/check.py config "$work/$name.yaml" || fail "config check with $name"
  echo "helm-check: $name: $(grep -c '^kind:' "$work/$name.yaml") documents" >&2
done

"$BIN/python" helm/check.py misspell "$work/production.yaml" >"$work/misspelt.yaml"
must_fail "a misspelt probe setting" periodSecond validate "$work/misspelt.yaml"
must_fail "an unknown value" "additional properties.*nonsense" render --set nonsense=1
must_fail "an unknown value further down" "additional properties.*replica" render --set data.replica=2
must_fail "a plane without instances" minimum render --set data.replicas=0
must_fail "a probe that nobody could reach" host render --set config.http.host=127.0.0.1
must_fail "a DSN in the ConfigMap" dsn render --set config.postgres.dsn=postgresql://u:p@db/x
render --set config.polcies.unmatched=plain >"$work/polcies.yaml"
must_fail "a misspelt setting" "'polcies' is no setting" "$BIN/python" helm/check.py config "$work/polcies.yaml"
sed 's/allowPrivilegeEscalation: false/allowPrivilegeEscalation: true/' "$work/production.yaml" >"$work/privileged.yaml"
must_fail "a container that may gain privileges" "may gain privileges" "$BIN/python" helm/check.py pods "$work/privileged.yaml"
echo "helm-check: ok, 8 controls red" >&2
