"""The commands of docs/service.md under "Over HTTP" do what the page says, as they stand there but for the port."""

import re
import subprocess
from pathlib import Path

from safetensors.numpy import load_file

import i2l
from conftest import MakeEngines, picture
from served import Served

PAGE = Path(i2l.__file__).parent / "docs" / "service.md"


def test_its_curl_commands_work(engines: MakeEngines, tmp_path: Path) -> None:
    commands = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(commands) == 4
    for seed, name in enumerate(("photo.jpg", "other.jpg")):
        picture(64, 48, seed).save(tmp_path / name)
    with Served(engines("tiny", "int8"), tmp_path) as served:
        script = "\n".join(["set -eu -o pipefail", *commands]).replace("127.0.0.1:8190", f"127.0.0.1:{served.port}")
        ran = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert [path.name for path in served.jobs.iterdir()] == ["lock"]  # the job was deleted
    assert len({len(load_file(tmp_path / f"{name}.safetensors")) for name in ("photo", "both", "lora")}) == 1
    assert "server-timing: images;dur=" in (tmp_path / "headers.txt").read_text()
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "event: end" in ran.stdout
    assert 'i2l_requests_total{outcome="done"} 3.0' in ran.stdout
