"""The base of what is read from and written to files, and the error of its checks."""

from pydantic import BaseModel, ConfigDict


class FrozenModel(BaseModel):
    """Immutable. An unknown key is an error, and so is a number that is not finite, unless a class allows it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, ser_json_inf_nan="constants")


class WrongSetting(ValueError):
    """Raised by a check of a whole section, to say which setting in it is at fault: its path from that section."""

    def __init__(self, setting: tuple[int | str, ...], message: str) -> None:
        super().__init__(message)
        self.setting = setting
