"""`tandem render-k8s`: from a plan to Kubernetes."""

import shutil
import subprocess
from pathlib import Path
from typing import Annotated

import typer

from tandem.cli.common import BUILT_IN_MODEL, Settings, writing
from tandem.cli.output import print_error, print_line
from tandem.cli.outputs import check_outputs
from tandem.cli.serve_file import read_plan
from tandem.core.config_file import apply_overrides, dump_config
from tandem.core.errors import ConfigError, UnavailableError
from tandem.core.plan import Plan
from tandem.core.printable import printable
from tandem.deploy.kubernetes.plan_values import CHART, check_model, values_of
from tandem.deploy.kubernetes.values import ChartValues

EPILOG = """\
examples:
  tandem render-k8s plan.yaml --set model.source=download --set model.download.repository=Qwen/Qwen3-8B
  tandem render-k8s plan.yaml -o chat.yaml --set workers.kind=LeaderWorkerSet --set image.repository=registry/tandem
  tandem render-k8s plan.yaml --manifests manifests.yaml     for people without Helm; this needs Helm

then:
  helm install chat CHART -f values.yaml      the command prints where the chart is

`tandem schema values` prints all values of the chart with their meanings."""


def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="plan (YAML)")],
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="the values (default: values.yaml, if there is none yet)")
    ] = None,
    manifests: Annotated[Path | None, typer.Option(help="write the rendered manifests, too")] = None,
    helm: Annotated[str, typer.Option(help="Helm, for --manifests")] = "helm",
    release: Annotated[str, typer.Option(help="name of the release, for --manifests")] = "tandem",
    namespace: Annotated[str, typer.Option(help="for --manifests")] = "default",
    settings: Settings,
) -> int:
    """Write the values of Tandem's Helm chart for a plan: a group of workers for each kind of instances, with the
    settings that `tandem serve` would give them, their devices and memory. An instance on several nodes of the plan
    becomes several pods of a LeaderWorkerSet. With --manifests, also what `kubectl apply` takes."""
    plan = read_plan(file)
    if output is None and Path("values.yaml").exists():
        raise ConfigError("values.yaml exists already; name it with -o values.yaml to replace it")
    output = output or Path("values.yaml")
    check_outputs({"the values": output, "the manifests": manifests}, {"the plan": file})
    values = apply_overrides(values_of(plan, BUILT_IN_MODEL), settings)
    check_model(plan, values)
    _warn(plan, values)
    with writing():
        text = f"# Values of Tandem's Helm chart for {printable(str(file))}.\n{dump_config(values, only_set=True)}"
        output.write_text(text, encoding="utf-8")
    print_line(f"wrote {output}; next: helm install {release} {CHART} -f {output}")
    if manifests is not None:
        token = values.clusterToken.existingSecret or f"{release}-token"
        text = _render(helm, output, release, namespace, token)
        with writing():
            manifests.write_text(text, encoding="utf-8")
        print_line(f"wrote {manifests}; next: kubectl create secret generic {token} -n {namespace} \\")
        print_line(f'  --from-literal={values.clusterToken.key}="$(openssl rand -hex 32)"')
        print_line(f"then: kubectl apply -n {namespace} -f {manifests}")
    return 0


def _warn(plan: Plan, values: ChartValues) -> None:
    devices = sorted({group.device for group in plan.groups})
    if len(devices) > 1 and not all(group.nodeSelector for group in values.workers.groups):
        print_error(
            f"note: the plan has devices of several kinds ({', '.join(devices)}); name the nodes of each group, such "
            "as --set workers.groups.0.nodeSelector={nvidia.com/gpu.product: NVIDIA-H100-80GB-HBM3}"
        )


def _render(helm: str, values: Path, release: str, namespace: str, token: str) -> str:
    """The manifests. The token's Secret is not among them: they may be kept where others read them."""
    if shutil.which(helm) is None:
        raise UnavailableError(f"there is no {helm} here, which --manifests needs; install Helm, or give --helm PATH")
    command = [helm, "template", release, str(CHART), "--namespace", namespace, "--values", str(values), "--skip-tests"]
    ended = subprocess.run(
        [*command, "--set", f"clusterToken.existingSecret={token}"], capture_output=True, encoding="utf-8", check=False
    )
    if ended.returncode:
        raise ConfigError(f"Helm refuses the values: {ended.stderr.strip()}")
    return ended.stdout
