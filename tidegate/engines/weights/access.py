"""From a source's text to the model behind it, with the credentials of this installation."""

from dataclasses import dataclass, field

from tidegate.domain.errors import Refusal
from tidegate.engines.weights.s3 import S3Access, S3Model
from tidegate.engines.weights.source import HubAddress, RemoteModel, S3Address, parse


@dataclass(frozen=True, slots=True)
class Access:
    """`hub_url` and `hub_token` None: the environment's HF_ENDPOINT and HF_TOKEN, else the public
    Hub, anonymous. The libraries load when a source needs them.
    """

    hub_url: str | None = None
    hub_token: str | None = field(default=None, repr=False)
    s3: S3Access = field(default_factory=S3Access)


def open_remote(source: str, access: Access) -> RemoteModel:
    """Lists a remote source. Raises WeightFault, or Refusal for text that names none."""
    match parse(source):
        case HubAddress() as address:
            try:
                from tidegate.engines.weights.hub import HubModel
            except ImportError as error:
                raise Refusal(
                    "invalid_configuration", "model: hf:// needs the extra: pip install 'tidegate[hub]'", param="model"
                ) from error
            return HubModel(address, endpoint=access.hub_url, token=access.hub_token)
        case S3Address() as address:
            return S3Model(address, access.s3)
        case None:
            raise AssertionError("a local directory is not opened as a remote source")
