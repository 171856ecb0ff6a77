"""The app in a browser: explain the answer to a document or an image, compare texts. Nothing here computes by itself.

models     what the app answers with: model folders, or small ones that it trains first
uploads    what visitors give, read within bounds; messages for them
results    answers as pieces of HTML, in which every text is escaped
page_store explanation pages under addresses that nobody can guess
gate       what a visitor may ask of the server, and how much at once
interface  tabs and buttons, by Gradio
server     the start, and what is switched off for it
space      the same as a Space of the Hub
"""
