"""Watch a model answer: a chat in the terminal, and a page that steps through the denoising of an answer."""

from dream_lightning.viewer.conversation import Conversation, Frame, Reply
from dream_lightning.viewer.page import denoising_page
from dream_lightning.viewer.terminal import Chat

__all__ = ["Chat", "Conversation", "Frame", "Reply", "denoising_page"]
