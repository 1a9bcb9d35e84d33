"""The NVIDIA card for `noodle doctor`: driver branch, containers' way to it, and whether the image has kernels for it.

The default card is a GTX 1050 (Pascal); the last driver branch for it is 580, the last torch 2.14.1 of cu126.
"""

from __future__ import annotations

import re
from pathlib import Path

from msgspec import Struct

from services.cli.doctor.docker import DockerFacts
from services.cli.doctor.outcome import Outcome, error, ok, skipped, warning
from services.cli.project.programs import Run, System

NVIDIA_SECONDS = 8.0  # a card that sleeps wakes up for the question
IMAGE_SECONDS = 20.0  # importing torch takes most of it
OLDEST_BRANCH = 525  # of CUDA 12
LAST_PASCAL_BRANCH = 580
FIRST_TURING = 7.5
NVIDIA_VENDOR = "0x10de"
GPU_COMPOSE_NAME = "docker-compose.gpu.yml"
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
    capability: float  # 6.1 is Pascal; 0 when the driver does not say
    memory: str = ""


class GpuFacts(Struct, frozen=True):
    """What is known of cards."""

    cards: tuple[Card, ...] = ()
    detail: str = ""  # why nvidia-smi named none
    has_driver: bool = False
    has_device: bool | None = None  # a card in a slot, whatever the driver says; None: not known
    image: str = ""  # of the GPU stage, where it is built
    architectures: tuple[str, ...] | None = None  # that image's kernels, None: not asked
    image_detail: str = ""  # why not


def gather_gpu(run: Run, system: System, project_folder: Path | None, *, is_wanted: bool) -> GpuFacts:
    """Ask nvidia-smi and, where the GPU stage's image is built, torch in it."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap,memory.total", "--format=csv,noheader"]
    ran = run(query, NVIDIA_SECONDS)
    cards = parse_cards(ran.output) if ran.is_good else ()
    detail = "" if cards else "no answer in time" if ran.is_late else ran.said
    has_device = _has_device(run, system)
    image, architectures, image_detail = "", None, "this machine's set has no GPU stage"
    if cards and is_wanted and project_folder is not None:
        image, architectures, image_detail = _ask_image(run, project_folder)
    return GpuFacts(cards, detail, not ran.is_missing, has_device, image, architectures, image_detail)


def parse_cards(text: str) -> tuple[Card, ...]:
    """nvidia-smi's lines."""
    cards = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 4:
            capability = float(parts[2]) if re.fullmatch(r"\d+\.\d+", parts[2]) else 0.0
            cards.append(Card(parts[0], parts[1], capability, parts[3]))
    return tuple(cards)


def check_gpu(
    facts: GpuFacts, docker: DockerFacts | None, where: str, system: System, *, is_wanted: bool
) -> list[Outcome]:
    """`is_wanted`: this machine's set computes on the card."""
    if not facts.cards:
        return [_without_card(facts, where, system, is_wanted=is_wanted)]
    outcomes = [_check_driver(card, where, system) for card in facts.cards]
    if not is_wanted:
        cure = "docker compose run --rm init --machine a --gpu && docker compose up -d --build"
        what = f"{facts.cards[0].name} is there, and this machine's set does not use it."
        return [*outcomes, warning("gpu", where, what, why="the CPU computes these layers slower", cure=cure)]
    outcomes.append(_check_runtime(docker, where, system))
    outcomes += [_check_kernels(card, facts, where) for card in facts.cards]
    return outcomes


def _without_card(facts: GpuFacts, where: str, system: System, *, is_wanted: bool) -> Outcome:
    why = "the stage would compute on the CPU, or not start"
    if facts.has_device:
        what = f"There is an NVIDIA card, but its driver names none ({facts.detail or 'no nvidia-smi'})."
        why = f"drivers after branch {LAST_PASCAL_BRANCH} have dropped cards as the GTX 1050"
        return (error if is_wanted else warning)("gpu", where, what, why=why, cure=DRIVER_580[system])
    if is_wanted:
        what = f"COMPOSE_FILE names {GPU_COMPOSE_NAME}, but no NVIDIA card is seen ({facts.detail or 'no nvidia-smi'})."
        return error("gpu", where, what, why=why, cure=f"take {GPU_COMPOSE_NAME} out of COMPOSE_FILE, in .env")
    return ok("gpu", where, "no NVIDIA card; computes on the CPU")


def _check_driver(card: Card, where: str, system: System) -> Outcome:
    branch = int(card.driver.split(".")[0]) if card.driver.split(".")[0].isdigit() else 0
    shown = f"{card.name} with driver {card.driver}"
    if branch and branch < OLDEST_BRANCH:
        why = f"CUDA 12 needs branch {OLDEST_BRANCH} or later"
        return error("driver", where, f"{shown}: too old.", why=why, cure=DRIVER_580[system])
    if branch > LAST_PASCAL_BRANCH and (0 < card.capability < FIRST_TURING or "GTX 10" in card.name):
        why = f"{LAST_PASCAL_BRANCH} is the last branch for this card; later ones drop it"
        return error("driver", where, f"{shown}: too new.", why=why, cure=DRIVER_580[system])
    return ok("driver", where, f"{shown}, {card.memory}")


def _check_runtime(docker: DockerFacts | None, where: str, system: System) -> Outcome:
    if docker is None or docker.problem or not docker.is_installed:
        return skipped("gpu runtime", where, "Docker does not answer")
    if docker.is_desktop:
        return ok("gpu runtime", where, "Docker Desktop hands the card to containers (WSL 2)")
    if "nvidia" in docker.runtimes or any("nvidia" in device for device in docker.devices):
        return ok("gpu runtime", where, "containers reach the card")
    what = "Docker does not know how to hand the card to a container."
    cure = TOOLKIT if system == "linux" else "winget upgrade -e --id Docker.DockerDesktop"
    return error("gpu runtime", where, what, why="the GPU stage would not start", cure=cure)


def _check_kernels(card: Card, facts: GpuFacts, where: str) -> Outcome:
    if facts.architectures is None:
        return skipped("kernels", where, facts.image_detail)
    if not card.capability:
        return skipped("kernels", where, f"the driver does not tell what {card.name} is")
    if runs_on(card.capability, facts.architectures):
        return ok("kernels", where, f"{facts.image} has kernels for {card.name} ({card.capability})")
    return error(
        "kernels",
        where,
        f"{facts.image} has no kernels for {card.name} ({card.capability}), only {' '.join(facts.architectures)}.",
        why="every step would fail with `no kernel image is available`",
        cure=_other_wheel(card.capability) + "docker compose build --no-cache stage-0",
    )


def _other_wheel(capability: float) -> str:
    """What to set first: cu126, the default of Dockerfile.gpu, is the index for old cards, cu130 that for new ones."""
    if capability < FIRST_TURING:
        return "take TORCH_GPU_INDEX_URL and TORCH_KERNELS out of .env (the default, cu126, has Pascal)\n"
    kernels = f"sm_{round(capability * 10)}"
    return f"in .env: TORCH_GPU_INDEX_URL=https://download.pytorch.org/whl/cu130 and TORCH_KERNELS={kernels}\n"


def runs_on(capability: float, architectures: tuple[str, ...]) -> bool:
    """Whether one of the kernels runs: of the same generation and not newer, or portable code that is not newer."""
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
            vendors = [
                path.read_text(encoding="ascii").strip() for path in Path("/sys/bus/pci/devices").glob("*/vendor")
            ]
        except OSError:
            return None
        return NVIDIA_VENDOR in vendors
    if system == "windows":
        command = "(Get-CimInstance Win32_VideoController).Name"
        ran = run(["powershell", "-NoProfile", "-Command", command], NVIDIA_SECONDS)
        return "NVIDIA" in ran.output if ran.is_good else None
    return None


def _ask_image(run: Run, folder: Path) -> tuple[str, tuple[str, ...] | None, str]:
    """The GPU stage's image, what torch in it was built for, or why that is not known."""
    question = ["docker", "compose", "--project-directory", str(folder), "config", "--images", GPU_SERVICE]
    named = run(question, IMAGE_SECONDS)
    image = named.output.split()[0] if named.is_good and named.output.split() else ""
    if not image:
        return "", None, f"compose does not name the image of {GPU_SERVICE}: {named.said}"
    if not run(["docker", "image", "inspect", image], NVIDIA_SECONDS).is_good:
        return image, None, f"the image {image} is not built yet"
    command = ["docker", "run", "--rm", "--network", "none", "--entrypoint", "python", image, "-c", ARCHITECTURES]
    ran = run(command, IMAGE_SECONDS)
    if not ran.is_good:
        return image, None, f"{image} did not say for which cards it is built: {ran.said}"
    return image, tuple(ran.output.split()), ""
