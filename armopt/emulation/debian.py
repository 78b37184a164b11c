"""Debian's archive as this machine reaches it, and apt with folders of its own."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from armopt.emulation.commands import run_command
from armopt.emulation.folder import digest
from armopt.errors import HostError

MIRROR_VARIABLE = "ARMOPT_DEBIAN_MIRROR"
_DEBIAN_SUITES = {"bullseye", "bookworm", "trixie", "forky", "sid", "oldstable", "stable", "testing"}
#: A line of --print-uris: the address, the file's name, its size, its hash.
_LISTED = re.compile(r"^'[^']+' (\S+) \d+ SHA256:([0-9a-f]{64})$", re.M)


# --- Debian ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mirror:
    """Debian's archive as this machine reaches it."""

    uri: str
    keyring: str

    def line(self, suite: str) -> str:
        """Returns the one-line entry of a suite for a sources.list."""
        options = f" [signed-by={self.keyring}]" if self.keyring else ""
        return f"deb{options} {self.uri} {suite} main\n"


def find_mirror(apt_folder: Path = Path("/etc/apt"), keyrings: Path = Path("/usr/share/keyrings")) -> Mirror:
    """Finds the mirror of Debian that this machine's apt settings name; ARMOPT_DEBIAN_MIRROR overrides it.

    Args:
        apt_folder: apt's settings.
        keyrings: Where Debian's own keyring is, if it is installed.

    Raises:
        HostError: They name none.
    """
    default_keyring = keyrings / "debian-archive-keyring.gpg"
    keyring = str(default_keyring) if default_keyring.exists() else ""
    if chosen := os.environ.get(MIRROR_VARIABLE):
        return Mirror(chosen, keyring)
    for entry in _apt_entries(apt_folder):
        uris = entry.get("uris", "").split()
        if (
            uris
            and "main" in entry.get("components", "").split()
            and not _DEBIAN_SUITES.isdisjoint(entry.get("suites", "").split())
        ):
            signed_by = entry.get("signed-by", "")
            return Mirror(uris[0], keyring or (signed_by if signed_by.startswith("/") else ""))
    raise HostError(
        "no mirror of Debian among this machine's apt sources",
        where=str(apt_folder),
        hint=f"Set {MIRROR_VARIABLE} to the address of one (QEMU and the arm64 C library come from Debian)",
    )


def _apt_entries(apt_folder: Path) -> Iterator[dict[str, str]]:
    """Yields each source, of either format, as deb822 fields with lower-case names."""
    parts = apt_folder / "sources.list.d"
    for file in [apt_folder / "sources.list", *sorted(parts.glob("*.list"))]:
        for line in file.read_text().splitlines() if file.is_file() else ():
            words = line.split("#")[0].replace("[", " [ ").replace("]", " ] ").split()
            if not words or words[0] != "deb":
                continue
            rest = words[words.index("]") + 1 :] if "]" in words else words[1:]
            if len(rest) >= 2:
                yield {"uris": rest[0], "suites": rest[1], "components": " ".join(rest[2:])}
    for file in sorted(parts.glob("*.sources")):
        lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
        for paragraph in "\n".join(lines).split("\n\n"):
            fields = (line.partition(":") for line in paragraph.splitlines() if ":" in line)
            yield {name.strip().lower(): value.strip() for name, _, value in fields}


@dataclass(frozen=True)
class Apt:
    """apt with folders of its own: it reads this machine's proxy settings, and changes nothing on it."""

    folder: Path
    archives: Path
    environment: dict[str, str]

    @classmethod
    def create(cls, folder: Path, mirror: Mirror, suite: str, architecture: str, archives: Path | None = None) -> Apt:
        """Makes the folders and fetches the suite's list of packages.

        Args:
            folder: A new one, for apt's own files.
            mirror: Where packages come from.
            suite: Of Debian.
            architecture: Of the packages.
            archives: Where packages are kept; in `folder` by default.
        """
        archives = archives or folder / "archives"
        for path in (
            folder / "lists" / "partial",
            folder / "nothing" / "partial",
            archives / "partial",
            folder / "dpkg",
        ):
            path.mkdir(parents=True, exist_ok=True)
        (folder / "dpkg" / "status").touch()
        (folder / "sources.list").write_text(mirror.line(suite))
        config = folder / "apt.conf"
        config.write_text(
            f'Dir::Etc::sourcelist "{folder}/sources.list";\n'
            'Dir::Etc::sourceparts "-";\n'
            'Dir::Etc::preferencesparts "-";\n'
            f'Dir::State "{folder}";\n'
            f'Dir::State::Lists "{folder}/lists";\n'
            f'Dir::State::status "{folder}/dpkg/status";\n'
            f'Dir::Cache "{folder}/cache";\n'
            f'Dir::Cache::Archives "{archives}";\n'
            f'APT::Architecture "{architecture}";\n'
            f'#clear APT::Architectures;\nAPT::Architectures {{ "{architecture}"; }};\n'
            'APT::Install-Recommends "false";\n'
            'APT::Sandbox::User "root";\n'
            'Acquire::Languages "none";\n'
            'Acquire::ForceHash "SHA256";\n'
            "Acquire::Retries 3;\n"
            # Hooks of the host, such as the one that empties the archives folder in containers.
            "#clear APT::Update::Post-Invoke;\n"
            "#clear APT::Update::Post-Invoke-Success;\n"
            "#clear DPkg::Post-Invoke;\n"
        )
        apt = cls(folder, archives, {**os.environ, "APT_CONFIG": str(config), "LC_ALL": "C"})
        run_command(["apt-get", "update", "-q", "--error-on=any"], f"Debian {suite}", env=apt.environment)
        return apt

    def fetch(self, packages: Sequence[str], *, dependencies: bool) -> list[Path]:
        """Downloads packages, with all they depend on if asked for; returns the .deb files.

        One that was downloaded before is taken again if its hash is the one in the suite's signed list.
        """
        kind = ("install", "-y", "--download-only") if dependencies else ("download",)
        command, what = ["apt-get", *kind, "-q", *packages], " ".join(packages)
        # Of what is in the folder of archives apt would list nothing, so it is shown an empty one.
        listing = [*command, "--print-uris", "-o", f"Dir::Cache::Archives={self.folder}/nothing"]
        listed = run_command(listing, what, cwd=self.folder, env=self.environment)
        wanted = {self.archives / name: known for name, known in _LISTED.findall(listed)}
        for package, known in wanted.items():
            if package.exists() and digest(package) != known:  # apt itself looks at the size alone
                package.unlink()
        run_command(command, what, cwd=self.archives, env=self.environment)
        return sorted(wanted)
