"""The command line of both programs: ``[CONFIG] [key.path=value ...] [--plan] [--help]``. No torch is imported here."""

import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitssl.config import Section, describe
from vitssl.errors import ConfigError

COLUMNS, INDENT = 80, 36  # of the help: a terminal's width, and where meanings begin


@dataclass(frozen=True)
class Command:
    """What was typed: a config file (None: the program's default), overrides, and flags with their values."""

    config: Path | None
    overrides: tuple[str, ...]
    flags: Mapping[str, str]

    def typed(self, program: str, *, launched: bool = False) -> str:
        """What was typed, to be typed again; what a launcher was told stands before it and is not known here."""
        words = map(shlex.quote, [*([str(self.config)] if self.config else []), *self.overrides])
        return " ".join([f"{'...' if launched else 'python'} -m {program}", *words])


def parse(argv: Sequence[str], *, flags: Mapping[str, Sequence[str]]) -> Command:
    """Read a command line. ``flags`` maps a flag to the values it takes (none: a switch). Raises ConfigError."""
    config, overrides, seen = None, [], {}
    words = iter(argv)
    for word in words:
        if word in ("-h", "--help"):
            seen["--help"] = ""
        elif word.startswith("-"):
            if word not in flags:
                raise ConfigError(f"{word}: unknown flag; known are --help, {', '.join(flags)}, and settings as key.path=value")
            allowed = flags[word]
            value = next(words, "") if allowed else ""
            if allowed and value not in allowed:
                raise ConfigError(f"{f'{word} {value}'.strip()}: takes one of {', '.join(allowed)}")
            seen[word] = value
        elif "=" in word:
            overrides.append(word)
        elif config is None:
            config = Path(word)
        else:
            raise ConfigError(f"{word}: a second config file beside {config}; settings are written key.path=value")
    return Command(config, tuple(overrides), seen)


def help_text(program: str, summary: str, model: type[Section], flags: Mapping[str, str]) -> str:
    """Usage, flags, and every key of the config with its default and meaning."""
    rows = describe(model)
    lines = [
        f"usage: python -m {program} [CONFIG.yaml] [key.path=value ...] {' '.join(f'[{flag}]' for flag in flags)}",
        "",
        summary,
        "",
    ]
    lines += [f"  {flag:<16} {meaning}" for flag, meaning in {"--help": "this text", **flags}.items()]
    lines += ["", "settings (key=default):"]
    for key, default, meaning in rows:
        setting, words = f"  {key}={default}", textwrap.wrap(meaning, COLUMNS - INDENT, break_on_hyphens=False)
        if len(setting) < INDENT and words:
            setting = f"{setting:<{INDENT}}{words.pop(0)}"
        lines += [setting, *(" " * INDENT + line for line in words)]
    return "\n".join(lines)
