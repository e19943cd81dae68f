"""The studio: a web page to edit in. Only its pages (`page`, `*_tab`, `parts`) import gradio."""
