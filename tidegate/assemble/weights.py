"""Configuration → where weights come from, the disk cache of this node, and the inspector of the control plane."""

from pathlib import Path

from tidegate.assemble.sockets import StartError
from tidegate.config import Config, WeightsConfig
from tidegate.engines.weights.access import Access, open_remote
from tidegate.engines.weights.cache import DiskCache
from tidegate.engines.weights.download import DownloadLimits
from tidegate.engines.weights.inspector import SourceInspector
from tidegate.engines.weights.node_weights import NodeWeights
from tidegate.engines.weights.peers import Peers
from tidegate.engines.weights.s3 import S3Access

FOLDER, BUDGET_FILE = "weights", "budget"
TOKEN_BYTES_MAX = 4_096


def inspector(config: Config, data: Path) -> SourceInspector:
    """Headers of remote models go to a scratch directory under `data`. StartError for an unreadable secret."""
    return SourceInspector(_access(config.weights), data / FOLDER / "scratch")


def cache_folder(config: Config, data: Path) -> Path:
    return config.weights.cache_dir or data / FOLDER


def node_weights(config: Config, data: Path, peers: Peers | None = None, *, guest: bool = False) -> NodeWeights:
    """The disk cache, within the budget `disk`. `peers` are nodes on other machines. A `guest` is a node that joined a
    platform on its machine, whose directory `data` is: they share one cache, so that what one of them fetches all have,
    within the platform's budget, or a guest of a smaller one would evict the platform's models. Raises StartError,
    OSError.
    """
    access = _access(config.weights)
    limits = DownloadLimits(connections=config.weights.connections)
    folder, budget = cache_folder(config, data), config.disk
    if guest and (folder / BUDGET_FILE).is_file():
        budget = int((folder / BUDGET_FILE).read_text())
    cache = DiskCache(folder, budget, lambda source: open_remote(source, access), limits, peers=peers)
    if not guest:
        (folder / BUDGET_FILE).write_text(f"{budget}\n")
    return NodeWeights(cache)


def _access(weights: WeightsConfig) -> Access:
    s3 = S3Access(weights.s3_endpoint, weights.s3_region, weights.s3_credentials_file)
    return Access(hub_url=weights.hub_url, hub_token=_token(weights), s3=s3)


def _token(weights: WeightsConfig) -> str | None:
    if weights.hub_token is not None:
        return weights.hub_token.get_secret_value()
    if weights.hub_token_file is None:
        return None
    try:
        with weights.hub_token_file.open() as file:
            return file.read(TOKEN_BYTES_MAX).strip() or None
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"weights.hub_token_file cannot be read ({type(error).__name__})") from error
