"""The NVIDIA card: its driver's branch, access from containers, and whether the image has kernels for it.

The reference card is a GTX 1050 (Pascal). Its last driver branch is 580, its last torch is 2.14.1 of cu126.
"""

from __future__ import annotations

import re
from pathlib import Path

from msgspec import Struct

from services.cli.doctor.docker import DockerFacts
from services.cli.doctor.results import CheckResult, error, ok, skipped, warning
from services.cli.project.machine_settings import GPU_FILE
from services.cli.project.programs import Run, System

NVIDIA_SECONDS = 8.0  # one question; a sleeping card wakes up for it
IMAGE_SECONDS = 20.0  # one question to the image; importing torch takes most of it
OLDEST_BRANCH = 525  # of CUDA 12
LAST_PASCAL_BRANCH = 580
FIRST_TURING = 7.5
NVIDIA_VENDOR = "0x10de"
GPU_SERVICE = "stage-0"
ARCHITECTURES = "import torch; print(' '.join(torch.cuda.get_arch_list()))"
DRIVER_580 = {
    "linux": "sudo apt-get install -y nvidia-driver-580   (Ubuntu; elsewhere the 580 package of the distribution)",
    "windows": "install a driver of branch 580 from https://www.nvidia.com/drivers (GeForce 10 series)",
    "other": "install a driver of branch 580",
}
TOOLKIT = (
    "sudo apt-get install -y nvidia-container-toolkit\n"
    "sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"
)


class Card(Struct, frozen=True):
    """One card, as nvidia-smi lists it."""

    name: str
    driver: str
    capability: float  # 6.1 is Pascal; 0 if the driver does not report it
    memory: str = ""


class GpuFacts(Struct, frozen=True, kw_only=True):
    """What is known about the cards."""

    cards: tuple[Card, ...] = ()
    detail: str = ""  # why nvidia-smi listed none
    has_driver: bool = False
    has_device: bool | None = None  # a card in a slot, even if the driver lists none; None: unknown
    image: str = ""  # the GPU stage's, if it is built
    architectures: tuple[str, ...] | None = None  # of that image's kernels; None: unknown
    image_detail: str = ""  # why they are unknown


def gather_gpu(run: Run, system: System, project_folder: Path | None, *, is_wanted: bool) -> GpuFacts:
    """Ask nvidia-smi, and torch in the GPU stage's image if it is built."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap,memory.total", "--format=csv,noheader"]
    ran = run(query, NVIDIA_SECONDS)
    cards = parse_cards(ran.output) if ran.is_good else ()
    image, architectures, image_detail = "", None, "this machine has no GPU stage"
    if cards and is_wanted and project_folder is not None:
        image, architectures, image_detail = _ask_image(run, project_folder)
    return GpuFacts(
        cards=cards,
        detail="" if cards else "no answer in time" if ran.is_late else ran.last_line,
        has_driver=not ran.is_missing,
        has_device=_has_device(run, system),
        image=image,
        architectures=architectures,
        image_detail=image_detail,
    )


def parse_cards(text: str) -> tuple[Card, ...]:
    cards = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 4:
            capability = float(parts[2]) if re.fullmatch(r"\d+\.\d+", parts[2]) else 0.0
            cards.append(Card(parts[0], parts[1], capability, parts[3]))
    return tuple(cards)


def check_gpu(
    facts: GpuFacts, docker: DockerFacts | None, where: str, system: System, *, is_wanted: bool
) -> list[CheckResult]:
    """Judge cards, driver and image; `is_wanted` if this machine's stage computes on the card."""
    if not facts.cards:
        return [_without_card(facts, where, system, is_wanted=is_wanted)]
    results = [_check_driver(card, where, system) for card in facts.cards]
    if not is_wanted:
        cure = "docker compose run --rm init --machine a --gpu && docker compose up -d --build"
        what = f"This machine's stage does not use its {facts.cards[0].name}."
        return [*results, warning("gpu", where, what, why="the CPU computes these layers more slowly", cure=cure)]
    results.append(_check_runtime(docker, where, system))
    results += [_check_kernels(card, facts, where) for card in facts.cards]
    return results


def _without_card(facts: GpuFacts, where: str, system: System, *, is_wanted: bool) -> CheckResult:
    why = "the stage would compute on the CPU, or not start"
    if facts.has_device:
        what = f"There is an NVIDIA card, but its driver lists none ({facts.detail or 'no nvidia-smi'})."
        why = f"drivers after branch {LAST_PASCAL_BRANCH} do not support cards as the GTX 1050"
        return (error if is_wanted else warning)("gpu", where, what, why=why, cure=DRIVER_580[system])
    if is_wanted:
        what = f"COMPOSE_FILE names {GPU_FILE}, but there is no NVIDIA card ({facts.detail or 'no nvidia-smi'})."
        return error("gpu", where, what, why=why, cure=f"remove {GPU_FILE} from COMPOSE_FILE, in .env")
    return ok("gpu", where, "no NVIDIA card; computes on the CPU")


def _check_driver(card: Card, where: str, system: System) -> CheckResult:
    branch = int(card.driver.split(".")[0]) if card.driver.split(".")[0].isdigit() else 0
    shown = f"{card.name} with driver {card.driver}"
    if branch and branch < OLDEST_BRANCH:
        why = f"CUDA 12 needs branch {OLDEST_BRANCH} or later"
        return error("driver", where, f"{shown}: too old.", why=why, cure=DRIVER_580[system])
    if branch > LAST_PASCAL_BRANCH and (0 < card.capability < FIRST_TURING or "GTX 10" in card.name):
        why = f"{LAST_PASCAL_BRANCH} is the last branch that supports this card"
        return error("driver", where, f"{shown}: too new.", why=why, cure=DRIVER_580[system])
    return ok("driver", where, f"{shown}, {card.memory}")


def _check_runtime(docker: DockerFacts | None, where: str, system: System) -> CheckResult:
    if docker is None or docker.problem or not docker.is_installed:
        return skipped("gpu runtime", where, "Docker does not answer")
    if docker.is_desktop:
        return ok("gpu runtime", where, "Docker Desktop gives containers access to the card (WSL 2)")
    if "nvidia" in docker.runtimes or any("nvidia" in device for device in docker.devices):
        return ok("gpu runtime", where, "containers have access to the card")
    what = "Docker cannot give a container access to the card."
    cure = TOOLKIT if system == "linux" else "winget upgrade -e --id Docker.DockerDesktop"
    return error("gpu runtime", where, what, why="the GPU stage would not start", cure=cure)


def _check_kernels(card: Card, facts: GpuFacts, where: str) -> CheckResult:
    if facts.architectures is None:
        return skipped("kernels", where, facts.image_detail)
    if not card.capability:
        return skipped("kernels", where, f"the driver does not report the capability of {card.name}")
    if runs_on(card.capability, facts.architectures):
        return ok("kernels", where, f"{facts.image} has kernels for {card.name} ({card.capability})")
    kernels = " ".join(facts.architectures)
    what = f"{facts.image} has no kernels for {card.name} ({card.capability}), only {kernels}."
    cure = _other_wheel(card.capability) + "docker compose build --no-cache stage-0"
    return error("kernels", where, what, why="every step would fail with `no kernel image is available`", cure=cure)


def _other_wheel(capability: float) -> str:
    """Return the settings for another wheel index: cu126, the default, is for old cards, cu130 for new ones."""
    if capability < FIRST_TURING:
        return "remove TORCH_GPU_INDEX_URL and TORCH_KERNELS from .env (the default, cu126, supports Pascal)\n"
    kernels = f"sm_{round(capability * 10)}"
    return f"in .env: TORCH_GPU_INDEX_URL=https://download.pytorch.org/whl/cu130 and TORCH_KERNELS={kernels}\n"


def runs_on(capability: float, architectures: tuple[str, ...]) -> bool:
    """Return whether a kernel runs on the card: same generation and not newer, or portable code that is not newer."""
    major, minor = divmod(round(capability * 10), 10)
    for architecture in architectures:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]*", architecture)
        if found is None:
            continue
        kind, built_major, built_minor = found[1], int(found[2]), int(found[3])
        if kind == "sm" and built_major == major and built_minor <= minor:
            return True
        if kind == "compute" and (built_major, built_minor) <= (major, minor):
            return True
    return False


def _has_device(run: Run, system: System) -> bool | None:
    if system == "linux":
        try:
            vendors = [path.read_text("ascii").strip() for path in Path("/sys/bus/pci/devices").glob("*/vendor")]
        except OSError:
            return None
        return NVIDIA_VENDOR in vendors
    if system == "windows":
        command = "(Get-CimInstance Win32_VideoController).Name"
        ran = run(["powershell", "-NoProfile", "-Command", command], NVIDIA_SECONDS)
        return "NVIDIA" in ran.output if ran.is_good else None
    return None


def _ask_image(run: Run, folder: Path) -> tuple[str, tuple[str, ...] | None, str]:
    """Return the GPU stage's image, the kernels of its torch, or why they are unknown."""
    question = ["docker", "compose", "--project-directory", str(folder), "config", "--images", GPU_SERVICE]
    named = run(question, IMAGE_SECONDS)
    image = named.output.split()[0] if named.is_good and named.output.split() else ""
    if not image:
        return "", None, f"compose does not name the image of {GPU_SERVICE}: {named.last_line}"
    if not run(["docker", "image", "inspect", image], NVIDIA_SECONDS).is_good:
        return image, None, f"the image {image} is not built yet"
    command = ["docker", "run", "--rm", "--network", "none", "--entrypoint", "python", image, "-c", ARCHITECTURES]
    ran = run(command, IMAGE_SECONDS)
    if not ran.is_good:
        return image, None, f"{image} did not report its kernels: {ran.last_line}"
    return image, tuple(ran.output.split()), ""
