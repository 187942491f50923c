"""What a wheel requires, without some packages: ``requirements_of.py WHEEL --without NAME…`` prints one a line.

For wheels whose own requirements pull builds this machine cannot use.
"""

import argparse
import email
import re
import zipfile


def requirements(wheel: str, without: set[str]) -> list[str]:
    """Its Requires-Dist lines that belong to no extra, less those packages."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(entry for entry in archive.namelist() if entry.endswith(".dist-info/METADATA"))
        listed = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []
    kept = [line for line in listed if "extra ==" not in line]
    return [line for line in kept if re.split(r"[^A-Za-z0-9._-]", line)[0].lower() not in without]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel")
    parser.add_argument("--without", nargs="*", default=[])
    arguments = parser.parse_args()
    print("\n".join(requirements(arguments.wheel, {name.lower() for name in arguments.without})))
