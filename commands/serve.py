"""``i2l serve``."""

from pathlib import Path

import click

from ..machine.wording import format_path
from .options import (
    PATH,
    SIZE,
    backend_option,
    cache_folder,
    debug_option,
    engines_option,
    needs_extra,
    no_cache_option,
    ram_budget_option,
    require_gpu_for_budget,
    threads_option,
    vram_budget_option,
    vram_margin_option,
)

SECONDS = click.FloatRange(min=0.1, max=86_400)


@click.command()
@engines_option
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Any but loopback needs a token or --insecure.",
)
@click.option(
    "--port", type=click.IntRange(0, 65_535), default=8190, show_default=True, metavar="N", help="0: a free one."
)
@click.option("--jobs-dir", type=PATH, metavar="DIR", show_default="beside the kept embeddings",
              help="Keeps accepted jobs and finished LoRAs.")  # fmt: skip
@click.option("--token-file", type=PATH, metavar="FILE", help="Ask every request for the token in FILE.")
@click.option("--insecure", is_flag=True, help="Let whoever reaches the address use it, without a token.")
@backend_option
@threads_option
@ram_budget_option
@vram_budget_option
@vram_margin_option
@no_cache_option
@click.option("--window", type=click.FloatRange(0, 60), default=0.0, show_default=True, metavar="SECONDS",
              help="How long a request waits for others to share its pass.")  # fmt: skip
@click.option("--pass-pictures", type=click.IntRange(1, 64), default=4, show_default=True, metavar="N",
              help="Pictures of several requests that share a pass.")  # fmt: skip
@click.option("--max-body", type=SIZE, default="64MiB", show_default=True, metavar="SIZE", help="Of a request.")
@click.option("--max-pixels", type=click.IntRange(min=1), default=100_000_000, show_default=True, metavar="N",
              help="Of a picture.")  # fmt: skip
@click.option("--max-pictures", type=click.IntRange(1, 256), default=16, show_default=True, metavar="N",
              help="Of a request.")  # fmt: skip
@click.option("--max-requests", type=click.IntRange(min=1), default=64, show_default=True, metavar="N",
              help="Received, waiting or running; further ones are told when to come back.")  # fmt: skip
@click.option("--time-limit", type=SECONDS, default=600.0, show_default=True, metavar="SECONDS",
              help="For a request.")  # fmt: skip
@click.option("--keep", type=SECONDS, default=3600.0, show_default=True, metavar="SECONDS",
              help="How long finished jobs are kept.")  # fmt: skip
@click.option("--stop-limit", type=SECONDS, default=60.0, show_default=True, metavar="SECONDS",
              help="For what was accepted, after SIGTERM.")  # fmt: skip
@debug_option
def serve(
    engines: Path,
    host: str,
    port: int,
    jobs_dir: Path | None,
    token_file: Path | None,
    backend: str,
    threads: int | None,
    ram_budget_bytes: int | None,
    vram_budget_bytes: int | None,
    vram_margin_bytes: int,
    window: float,
    pass_pictures: int,
    max_body: int,
    max_pixels: int,
    max_pictures: int,
    max_requests: int,
    time_limit: float,
    keep: float,
    stop_limit: float,
    *,
    insecure: bool,
    no_cache: bool,
) -> None:
    """Make LoRAs over HTTP, with a page for people.

    The engines stay open. SIGTERM or Ctrl-C stops it once what it accepted is done.
    """
    require_gpu_for_budget(backend, vram_budget_bytes)
    with needs_extra("serve", "i2l serve"):
        from ..serve.http.serving import serve as listen  # noqa: PLC0415
        from ..serve.service import Service  # noqa: PLC0415
    from ..machine.progress import Report  # noqa: PLC0415
    from ..runtime.cache import default_cache_folder  # noqa: PLC0415
    from ..runtime.pipeline import Pipeline  # noqa: PLC0415
    from ..serve.errors import TokenUnusable  # noqa: PLC0415
    from ..serve.settings import ServeLimits, Sharing, read_token, require_guarded  # noqa: PLC0415

    token = None
    if token_file is not None:
        try:
            token = read_token(token_file)
        except OSError as error:
            raise TokenUnusable(token_file, error.strerror or str(error)) from error
        except ValueError as error:
            raise TokenUnusable(token_file, str(error)) from error
    require_guarded(host, has_token=token is not None, insecure=insecure)
    cache = cache_folder(no_cache=no_cache)
    jobs_dir = jobs_dir or default_cache_folder().parent / "jobs"

    def open_pipeline(chosen: str, report: Report) -> Pipeline:
        return Pipeline(
            engines,
            backend=chosen,
            threads=threads,
            ram_budget_bytes=ram_budget_bytes,
            vram_budget_bytes=vram_budget_bytes,
            vram_margin_bytes=vram_margin_bytes,
            report=report,
            cache=cache,
        )

    service = Service(
        jobs_dir,
        open_pipeline,
        backend=backend,
        limits=ServeLimits(
            body_bytes=max_body,
            pixels=max_pixels,
            pictures=max_pictures,
            requests=max_requests,
            request_seconds=time_limit,
            keep_seconds=keep,
            stop_seconds=stop_limit,
        ),
        sharing=Sharing(window, pass_pictures),
    )
    click.echo(f"jobs are kept in {format_path(jobs_dir)}", err=True)
    listen(service, host=host, port=port, token=token, insecure=insecure)
