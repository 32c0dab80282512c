"""Downloads against a server on loopback: whole, cut off, refused, or with something else in place of the file."""

import hashlib
import re
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gdown
import numpy as np
import pytest
import yaml

from facecls import download
from facecls.data.split import split_files
from facecls.data.synthetic import write_faces
from facecls.download import FARL, LABELS, MOBILENET, SPLIT, SPLITS, UTKFACE, WEIGHTS, fetch, main
from facecls.errors import UserError

SIZE = 3_000_000
TWO_BLOCKS = 1_048_576
"""Bytes; two of the blocks that gdown reads."""
HDF5_START = b"\x89HDF\r\n\x1a\n"
WHOLE_FILE = HDF5_START + np.random.default_rng(0).bytes(SIZE - 8)
DIGEST = hashlib.sha256(WHOLE_FILE).hexdigest()
PAGE = b"<!DOCTYPE html><html><title>Google Drive - Quota exceeded</title></html>"


class _Server(ThreadingHTTPServer):
    """Serves one file with byte ranges, as the tests tell it to.

    Attributes:
        body: What it serves.
        status: Its answer in place of 200, if any.
        stop_after: Bytes of a body after which it hangs up.
        ranges: The Range header of every request.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.body = WHOLE_FILE
        self.status = None
        self.stop_after = None
        self.ranges = []

    def handle_error(self, request, client_address):
        """Stays silent about a client that has hung up."""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/file"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        if self.server.status:
            self.send_error(self.server.status)
            return
        body, first = self.server.body, 0
        if asked:
            first = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(body) - first))
        self.end_headers()
        if self.server.stop_after is None:
            self.wfile.write(body[first:])
        else:
            self.wfile.write(body[first : first + self.server.stop_after])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with _Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def source(server, monkeypatch):
    monkeypatch.setattr(download, "_RETRIES", 0)
    return replace(WEIGHTS["resnet50face.h5"], url=server.url, smallest=SIZE, largest=SIZE)


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_whole_file_arrives_and_nothing_else(server, source, tmp_path, capsys):
    dest = fetch(source, tmp_path / "new" / "weights")
    assert dest == tmp_path / "new" / "weights" / "resnet50face.h5"
    assert dest.read_bytes() == WHOLE_FILE
    assert _names(dest.parent) == ["resnet50face.h5"]
    (tmp_path / "any").touch()
    assert dest.stat().st_mode == (tmp_path / "any").stat().st_mode  # others may read it
    said = capsys.readouterr().out
    assert f"Downloaded {dest} (3.0 MB)" in said
    assert f"No checksum of it is published: its kind and size are as expected, and its SHA-256 is {DIGEST}." in said


def test_published_checksum_is_said_to_be_right(source, tmp_path, capsys):
    known = replace(source, sha256=DIGEST)
    fetch(known, tmp_path)
    fetch(known, tmp_path)  # as it lies there
    first, again = filter(None, capsys.readouterr().out.splitlines())  # rich leaves an empty line after its bar
    right = "Its SHA-256 is the published one."
    assert re.fullmatch(f"Downloaded .* {right}", first)
    assert re.fullmatch(f".* exists already; .* {right}", again)


OTHER = hashlib.sha256(b"another file").hexdigest()


@pytest.mark.parametrize(
    ("other", "expected", "came"),
    [
        ({"sha256": OTHER}, f"the published file, whose SHA-256 is {OTHER}", f"it has {DIGEST}"),
        (
            {"smallest": SIZE + 1, "largest": 2 * SIZE},
            "an HDF5 file of 3,000,001 to 6,000,000 bytes",
            "3,000,000 bytes",
        ),
    ],
    ids=["checksum", "too small"],
)
def test_another_file_is_refused_and_removed(source, tmp_path, other, expected, came):
    wanted = replace(source, **other)
    with pytest.raises(UserError, match=f"sent something that is not {expected}: .*{came}; download it by hand"):
        fetch(wanted, tmp_path)
    assert _names(tmp_path) == []
    (tmp_path / source.name).write_bytes(WHOLE_FILE)
    with pytest.raises(UserError, match=f"to be {expected}, but .*{came}; delete it to download it again"):
        fetch(wanted, tmp_path)
    assert (tmp_path / source.name).read_bytes() == WHOLE_FILE  # what lies there is the user's


def test_larger_file_is_stopped_before_it_is_there(server, source, tmp_path):
    server.body = WHOLE_FILE + bytes(1)
    with pytest.raises(UserError, match="the server sends more than an HDF5 file of 3,000,000 to 3,000,000 bytes"):
        fetch(source, tmp_path)
    assert _names(tmp_path) == []


def test_finished_file_is_not_fetched_again(server, source, tmp_path, capsys):
    fetch(source, tmp_path)
    server.ranges.clear()
    capsys.readouterr()
    assert fetch(source, tmp_path).read_bytes() == WHOLE_FILE
    assert server.ranges == []
    assert "exists already; delete it to download it again" in capsys.readouterr().out


def test_page_saved_by_hand_in_place_of_the_file_is_noticed(source, tmp_path):
    (tmp_path / source.name).write_bytes(PAGE)
    with pytest.raises(UserError, match="to be an HDF5 file, but it begins with b'<!DOCTYPE html><'; delete it"):
        fetch(source, tmp_path)


def test_download_cut_off_goes_on_where_it_stopped(server, source, tmp_path):
    server.stop_after = TWO_BLOCKS + 1000  # gdown keeps whole blocks
    said = rf"received {TWO_BLOCKS} bytes but the server announced {SIZE} bytes; run it again to resume, .*by hand"
    with pytest.raises(UserError, match=said):
        fetch(source, tmp_path)
    [part] = _names(tmp_path)
    assert part.endswith(".part")

    server.stop_after = None
    server.ranges.clear()
    assert fetch(source, tmp_path).read_bytes() == WHOLE_FILE
    assert server.ranges[-1] == f"bytes={TWO_BLOCKS}-"
    assert _names(tmp_path) == [source.name]


def test_short_break_is_bridged_within_one_call(server, source, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_RETRIES", 2)
    monkeypatch.setattr("random.uniform", lambda low, high: 0.0)  # gdown waits that long
    server.stop_after = TWO_BLOCKS
    assert fetch(source, tmp_path).read_bytes() == WHOLE_FILE
    assert server.ranges == [None, f"bytes={TWO_BLOCKS}-", f"bytes={2 * TWO_BLOCKS}-"]


@pytest.mark.parametrize("status", [403, 404, 503])
def test_server_error_is_one_line_that_says_where_to_get_the_file(server, source, tmp_path, status):
    server.status = status
    with pytest.raises(UserError, match=f"the server answered {status} .*by hand from {source.page} and put it at"):
        fetch(source, tmp_path)
    assert _names(tmp_path) == []


@pytest.mark.parametrize("retries", [0, 1])
def test_refused_connection(server, source, tmp_path, monkeypatch, retries):
    monkeypatch.setattr(download, "_RETRIES", retries)
    monkeypatch.setattr("random.uniform", lambda low, high: 0.0)
    server.server_close()  # nobody listens at the port from here on
    with pytest.raises(UserError, match=f"no connection to the server; download it by hand from {source.page}"):
        fetch(source, tmp_path)
    assert _names(tmp_path) == []


def test_silent_server_is_given_up(server, source, tmp_path, monkeypatch):
    answer = _Handler.do_GET

    def answer_late(handler):
        time.sleep(1)
        answer(handler)

    monkeypatch.setattr(download, "_TIMEOUT", 0.2)
    monkeypatch.setattr(_Handler, "do_GET", answer_late)
    with pytest.raises(UserError, match="no connection to the server"):
        fetch(source, tmp_path)


@pytest.mark.parametrize(
    "wanted", [*WEIGHTS.values(), MOBILENET, FARL, LABELS, UTKFACE, SPLIT], ids=lambda source: source.name
)
def test_page_in_place_of_a_file_is_never_accepted(server, tmp_path, wanted):
    server.body = PAGE
    with pytest.raises(UserError, match=f"sent something that is not {wanted.kind}: it begins .*; download it by hand"):
        fetch(replace(wanted, url=server.url), tmp_path)
    assert _names(tmp_path) == []


def test_page_of_google_drive_itself(source, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise gdown.FileURLRetrievalError("Failed to retrieve file url:\n\n\tToo many users have viewed this file")

    monkeypatch.setattr(gdown, "download", refuse)
    with pytest.raises(UserError, match="Google Drive sent a page instead"):
        fetch(source, tmp_path)


def _labels_file(folder):
    np.save(folder / "made.npy", np.array(["A._J._Buckley"]))
    return (folder / "made.npy").read_bytes()


def _archive(folder):
    write_faces(folder / "faces", 1, seed=0)
    with tarfile.open(folder / "made.tar.gz", "w:gz") as archive:
        archive.add(folder / "faces")
    return (folder / "made.tar.gz").read_bytes()


@pytest.mark.parametrize(
    ("wanted", "make"),
    [
        (LABELS, _labels_file),
        (UTKFACE, _archive),
        (SPLIT, lambda folder: b"img_name,is_train\n1_0_0_20161219140623097.jpg.chip.jpg,1\n"),
        (SPLIT, lambda folder: b",img_name,is_train\n0,1_0_0_20161219140623097.jpg.chip.jpg,1\n"),
    ],
    ids=["labels", "utkface", "split", "split with index"],
)
def test_every_kind_of_real_file_is_accepted(server, tmp_path, wanted, make):
    server.body = make(tmp_path)
    assert fetch(replace(wanted, url=server.url, smallest=1), tmp_path / "new").read_bytes() == server.body


def test_folder_that_cannot_be_made(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Can't create the folder"):
        fetch(source, tmp_path / "file" / "weights")


def test_full_disk_is_one_line(source, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gdown, "download", fail)
    with pytest.raises(UserError, match=r"Can't write .*: No space left on device; free some space"):
        fetch(source, tmp_path)


def test_interrupt_leaves_a_part_to_go_on_from(server, source, tmp_path, monkeypatch, capsys):
    """Ctrl-C in mid-file: status 130, no file under its name, and the next run asks for the rest only."""
    real = gdown.download

    def interrupted(*args, progress, **kwargs):
        def stop_in_the_middle(done, total):
            progress(done, total)
            if done > SIZE // 3:
                raise KeyboardInterrupt

        return real(*args, progress=stop_in_the_middle, **kwargs)

    monkeypatch.setitem(WEIGHTS, source.name, source)
    monkeypatch.setattr(gdown, "download", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["weights", "--dest", str(tmp_path)])
    assert stopped.value.code == 130
    assert "interrupted" in capsys.readouterr().err
    [part] = tmp_path.iterdir()
    assert part.name.endswith(".part")
    arrived = part.stat().st_size
    assert SIZE // 3 < arrived < SIZE

    monkeypatch.setattr(gdown, "download", real)
    main(["weights", "--dest", str(tmp_path)])
    assert server.ranges[-1] == f"bytes={arrived}-"
    assert (tmp_path / source.name).read_bytes() == WHOLE_FILE


def test_failed_command_ends_with_status_2_and_one_line(server, source, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(WEIGHTS, source.name, source)
    server.status = 404
    with pytest.raises(SystemExit) as stopped:
        main(["weights", "--dest", str(tmp_path)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "facecls.download: error: Can't download resnet50face.h5: the server answered 404 Not Found"
    )
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["weights"], "resnet50face.h5"),
        (["weights", "--file", "rcmalli_vggface_tf_resnet50.h5"], "rcmalli_vggface_tf_resnet50.h5"),
        (["weights", "--file", "rcmalli_vggface_tf_notop_resnet50.h5"], "rcmalli_vggface_tf_notop_resnet50.h5"),
        (["vgg2_mobilenet"], "vgg2_mobilenet.h5"),
        (["farl"], "FaRL-Base-Patch16-LAIONFace20M-ep64.pth"),
        (["labels"], "rcmalli_vggface_labels_v2.npy"),
        (["utkface"], "UTKFace.tar.gz"),
        (["split"], "utkface_split.csv"),
    ],
)
def test_command_line_names_the_file(monkeypatch, tmp_path, arguments, name):
    fetched = []
    monkeypatch.setattr(download, "fetch", lambda source, folder: fetched.append((source.name, folder)))
    main([*arguments, "--dest", str(tmp_path)])
    assert fetched == [(name, tmp_path)]


CORAL = b",file,age\n1,36_0_1_20170117163203851.jpg.chip.jpg,15\n"
"""The first lines of the CORAL paper's training part, ages counted from 21."""


def test_splits_fetches_all_that_the_protocols_name(server, monkeypatch, tmp_path):
    """Each of its kind: what stands for one is no other, and a page is none."""
    monkeypatch.setattr(download, "_RETRIES", 0)
    monkeypatch.setattr(
        download, "SPLITS", [replace(source, url=server.url, smallest=len(CORAL)) for source in SPLITS[1:]]
    )
    server.body = CORAL
    main(["splits", "--dest", str(tmp_path)])
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == [CORAL, CORAL]
    named = set()
    for path in (Path(download.__file__).parent.parent / "configs/protocols").glob("*.yaml"):
        named |= {Path(file).name for file in split_files(yaml.safe_load(path.read_text())["data"]["split_file"])}
    assert named == {source.name for source in SPLITS}


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("body", [PAGE, b"img_name,train\n" * 2, b"<html>,file,age\n"])
def test_what_is_no_such_split_is_not_kept(server, monkeypatch, tmp_path, number, body):
    if number == 0 and body.startswith(b"img_name"):
        body = b"name,is_train\n"
    monkeypatch.setattr(download, "_RETRIES", 0)
    server.body = body
    with pytest.raises(UserError, match="the server sent something that is not a CSV file with the column"):
        fetch(replace(SPLITS[number], url=server.url), tmp_path)
    assert _names(tmp_path) == []


def test_help_does_not_load_torch_or_gdown():
    command = [
        "-c",
        "import sys; from facecls.download import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'gdown', 'timm', 'rich'} & set(sys.modules)))",
    ]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "imagenet" in done.stdout
