"""Runs the container of a rendered pod as Kubernetes would: its user, a read-only root, an empty /tmp, no capabilities,
its settings and Secrets as files, its arguments and variables. The image is this checkout. All pods share a network, in
which nothing else listens. Needs root.
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.deploy.kubernetes.manifests import ROOT, Document, expanded

USER = 10001
TOKEN = "the-token-of-the-cluster"
# What `exec` gets has the root of this machine, read-only, but for what a pod has of its own.
_CONTAINER = """
mount --make-rprivate /
mount --bind {folder} /media
if test -d {python}; then mount --bind {python} /mnt; fi
mount -t tmpfs -o mode=755 none /run
cp -a /etc /run/etc
mkdir -p /run/etc/tandem /run/secrets/tandem
cp /media/settings.yaml /run/etc/tandem/
cat /media/hosts >> /run/etc/hosts
install -o root -g {user} -m 440 /media/token /run/secrets/tandem/token
mount --bind /run/etc /etc
mount -t tmpfs -o mode=755 none /opt
mkdir /opt/tandem
ln -s {models} /opt/tandem/models
if test -d {python}; then
  mount -t tmpfs -o mode=755 none /root
  mkdir -p {python}
  mount --bind /mnt {python}
fi
mount -t tmpfs -o mode=1777 none /tmp
if test -d /media/kernels; then
  install -d -o {user} -m 700 /tmp/cache /tmp/cache/tandem
  install -o {user} -m 700 /media/kernels/*.so /tmp/cache/tandem/
fi
mount -t tmpfs -o mode=1777 none /dev/shm
for path in / /run /opt /etc /media /mnt /root; do
  if mountpoint -q $path; then mount -o remount,bind,ro $path; fi
done
cd /tmp
exec setpriv --reuid {user} --regid {user} --groups {user} --no-new-privs --inh-caps=-all --bounding-set=-all \\
  env -i {variables} {command}
"""


def is_possible() -> bool:
    """Whether this process may make namespaces and mounts."""
    if os.geteuid() != 0 or not all(shutil.which(name) for name in ("unshare", "nsenter", "setpriv", "ip")):
        return False
    return subprocess.run(["unshare", "--net", "--mount", "true"], check=False).returncode == 0


@dataclass
class Pods:
    """Running pods by name. `network`: a process in their network; `kernels`: a folder with compiled ones, or each pod
    compiles them itself, as on Kubernetes."""

    folder: Path
    network: subprocess.Popen[str]
    hosts: Mapping[str, str]
    kernels: Path | None = None
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, template: Document, ip: str, **variables: str) -> None:
        """The only container of a pod template. `variables`: what an operator adds to those of the template."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        (folder / "settings.yaml").write_text(template["metadata"]["annotations"]["tandem.serve/settings"])
        (folder / "token").write_text(TOKEN)
        (folder / "hosts").write_text("".join(f"{address} {host}\n" for host, address in self.hosts.items()))
        if self.kernels is not None:
            shutil.copytree(self.kernels, folder / "kernels", dirs_exist_ok=True)
        (container,) = template["spec"]["containers"]
        assert template["spec"]["securityContext"]["runAsUser"] == USER
        if "POD_IP" in {each["name"] for each in container.get("env", ())}:
            variables["POD_IP"] = ip
        script = _CONTAINER.format(
            folder=folder,
            python=sys.base_prefix if sys.base_prefix.startswith("/root/") else "/nowhere",
            models=ROOT / "models",
            user=USER,
            variables=" ".join(shlex.quote(each) for each in (*_image_variables(), f"PYTHONPATH={ROOT}")),
            command=shlex.join([sys.executable, "-m", "tandem.cli.main", *expanded(container["args"], variables)]),
        )
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [*self._inside(), "unshare", "--mount", "bash", "-ec", script], stdout=log, stderr=subprocess.STDOUT
            )

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        """Python in the pods' network."""
        command = [*self._inside(), sys.executable, "-c", script]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    def rights(self, name: str) -> dict[str, str]:
        """Of the pod's process, as in /proc/PID/status; and under `/`, the options with which its root is mounted."""
        proc = Path(f"/proc/{self.processes[name].pid}")
        status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines() if ":\t" in line)
        mounts = (line.split() for line in (proc / "mounts").read_text().splitlines())
        return status | {target: options for _, target, _, options, *_ in mounts}

    def terminate(self, name: str, timeout_s: float) -> int:
        """SIGTERM; the exit status."""
        self.signal(name)
        return self.wait(name, timeout_s)

    def signal(self, name: str) -> None:
        """SIGTERM."""
        self.processes[name].send_signal(signal.SIGTERM)

    def kill(self, name: str) -> None:
        """SIGKILL."""
        self.processes[name].kill()
        self.wait(name, 10.0)

    def wait(self, name: str, timeout_s: float) -> int:
        """Until it ends; the exit status."""
        status = self.processes[name].wait(timeout_s)
        del self.processes[name]
        return status

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in self.folder.glob("*.log"))

    def _inside(self) -> list[str]:
        return ["nsenter", f"--net=/proc/{self.network.pid}/ns/net"]


@contextlib.contextmanager
def pod_network(
    folder: Path, ips: Sequence[str], hosts: Mapping[str, str], kernels: Path | None = None
) -> Iterator[Pods]:
    """`ips`: of pods; `hosts`: names in DNS with their addresses."""
    addresses = "".join(f"ip addr add {ip}/32 dev lo; " for ip in ips)
    command = ["unshare", "--net", "bash", "-ec", f"ip link set lo up; {addresses} echo up; exec sleep 600"]
    network = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    pods = Pods(folder, network, hosts, kernels)
    try:
        assert network.stdout is not None
        assert network.stdout.readline() == "up\n"
        yield pods
    finally:
        for process in (*pods.processes.values(), network):
            process.kill()
            process.wait(10)
        assert network.stdout is not None
        network.stdout.close()


def _image_variables() -> list[str]:
    """Of the image, without its PATH, with which `env` finds what `command` names by its path."""
    (line,) = re.findall(r"(?m)^ENV (PATH=.*)$", (ROOT / "Dockerfile").read_text())
    return [f"PATH={os.environ['PATH']}", *(each for each in line.split() if not each.startswith("PATH="))]
