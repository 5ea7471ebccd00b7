"""Speech recognition with a fine-tuned HuBERT: CTC and, as an option, an attention decoder."""

from .alphabet import Alphabet, normalize_text
from .checkpoint import load_recognizer
from .model import Recognizer, RecognizerConfig
from .search import Hypothesis, decode, transcribe

__all__ = ["Alphabet", "Hypothesis", "Recognizer", "RecognizerConfig", "decode", "load_recognizer", "normalize_text", "transcribe"]
