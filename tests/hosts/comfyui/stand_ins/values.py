"""A node whose output fits every socket, as packs of utilities have them."""


class Any(str):
    def __ne__(self, other):
        return False

    __hash__ = str.__hash__


class AnyText:
    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"text": ("STRING", {})}}

    RETURN_TYPES, FUNCTION, CATEGORY = (Any("*"),), "run", "stand-ins"

    def run(self, text):
        return (text,)
