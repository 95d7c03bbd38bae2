"""What may lie where a file is wanted: a folder, a named pipe, a socket, a device, a broken or circular link."""

import os
import socket


def make_special(kind, path):
    """Put something that is no regular file at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    match kind:
        case "folder":
            path.mkdir()
        case "named pipe":
            os.mkfifo(path)
        case "socket":
            here = os.getcwd()
            os.chdir(path.parent)  # the address of a socket has at most 107 bytes
            try:
                with socket.socket(socket.AF_UNIX) as made:
                    made.bind(path.name)
            finally:
                os.chdir(here)
        case "device":
            path.symlink_to("/dev/zero")
        case "broken link":
            path.symlink_to(path.parent / "nowhere")
        case "circular link":
            path.symlink_to(path)


SPECIAL = ("folder", "named pipe", "socket", "device", "broken link", "circular link")
