"""How the page of ``diffusion ui`` looks, and what the browser does without asking: its CSS and JavaScript."""

# On a narrow page what is drawn is far below the button.
LOOK = """() => document.getElementById("drawn").scrollIntoView({ behavior: "smooth", block: "nearest" })"""
# Browsers have a clipboard for pages of this machine, or of https; for others there is what came before it.
COPY = """line => {
    if (navigator.clipboard) { navigator.clipboard.writeText(line); return line; }
    const box = document.body.appendChild(Object.assign(document.createElement("textarea"), { value: line }));
    box.select(); document.execCommand("copy"); box.remove();
    return line;
}"""
STYLE = """
.gradio-container .main { padding: clamp(8px, 2vw, 28px) !important; max-width: 1520px; margin: 0 auto; }
.gradio-container main { padding: 0 !important; }
#title > div, #title .prose { display: flex; align-items: baseline; gap: 10px; }
#title h1 { font-size: 19px; font-weight: 650; letter-spacing: -.01em; margin: 0; }
#title p { margin: 0; color: var(--body-text-color-subdued); }
#desk { align-items: flex-start; }
#seed-row { align-items: flex-end; } #seed-row button { height: 37px; margin-bottom: 10px; font-weight: 400; }
#prompt textarea { min-height: 54px; }
#picture img { width: 100%; height: 100%; object-fit: contain; }
#status { min-height: 30px; }
#status p, #status label { display: flex; align-items: center; gap: 12px; margin: 4px 2px; min-height: 22px;
  font-variant-numeric: tabular-nums; }
#status [data-testid=status-tracker] { display: none; }
#status progress { flex: 1; height: 6px; appearance: none; border: 0; border-radius: 3px; overflow: hidden;
  background: var(--border-color-primary); }
#status progress::-webkit-progress-bar { background: none; }
#status progress::-webkit-progress-value { background: var(--color-accent); }
#status progress::-moz-progress-bar { background: var(--color-accent); }
#status [role=alert] { color: var(--error-text-color, #b91c1c); font-weight: 600; max-height: 7em; overflow: auto; }
#command textarea { font: 12px/1.5 var(--font-mono); }
#gallery .caption-label { display: none; }
#gallery .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)); grid-auto-rows: max-content; gap: 6px;
  padding: 6px; }
#gallery .thumbnail-lg { width: 100%; height: auto; min-height: 0; aspect-ratio: 1; }
#facts h2 { font-size: 15px; font-weight: 600; margin: 4px 2px 6px; overflow-wrap: anywhere; }
#facts dl { display: grid; grid-template-columns: repeat(3, 1fr); gap: 6px 12px; margin: 0 2px; }
#facts .wide { grid-column: 1 / -1; }
#facts dt { font-size: 11px; color: var(--body-text-color-subdued); }
#facts dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
#facts p { margin: 6px 2px 0; font-size: 11px; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
#facts p[role=alert] { font-size: inherit; color: var(--error-text-color, #b91c1c); }
"""
