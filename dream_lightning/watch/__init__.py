"""To watch the model answer: a conversation in the terminal, and a page that shows how one answer was filled in."""

from dream_lightning.watch.conversation import Conversation, Frame, Reply
from dream_lightning.watch.loading import open_model
from dream_lightning.watch.page import denoising_page
from dream_lightning.watch.terminal import Chat

__all__ = ["Chat", "Conversation", "Frame", "Reply", "denoising_page", "open_model"]
