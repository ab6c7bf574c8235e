"""To watch the model answer: a conversation in the terminal, and a page that shows how one answer was filled in."""

from dream_lightning.viewer.conversation import Conversation, Frame, Reply
from dream_lightning.viewer.loading import open_model
from dream_lightning.viewer.page import denoising_page
from dream_lightning.viewer.terminal import Chat

__all__ = ["Chat", "Conversation", "Frame", "Reply", "denoising_page", "open_model"]
