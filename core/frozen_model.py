"""The base class of settings and other values in files, and the error of their checks."""

from pydantic import BaseModel, ConfigDict


class FrozenModel(BaseModel):
    """Immutable. An unknown key is an error, and so is a number that is not finite, unless a class allows it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, ser_json_inf_nan="constants")


class WrongSetting(ValueError):
    """Raised by a check of a complete section. `setting` is the path of the setting at fault from that section."""

    def __init__(self, setting: tuple[int | str, ...], message: str) -> None:
        super().__init__(message)
        self.setting = setting
