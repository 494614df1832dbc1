"""Style and script of the human evaluation's page."""

STYLE = """
.photos img, .two img { border-radius: 4px; margin-right: 6px; } .prompt { font-size: 1.15em; }
.two { display: flex; gap: 12px; flex-wrap: wrap; } figure { margin: 0; } figure img { max-width: 100%; height: auto; }
fieldset { border: 0; padding: 0; margin: .6em 0; } label { margin-right: 1.2em; }
article.open { outline: 2px solid var(--b); }
"""
SCRIPT = """
const kit = document.querySelector('main').dataset.kit, person = document.querySelector('#person')
const said = document.querySelector('output'), name = 'answers-' + kit
const answers = () => {
  const all = {}
  for (const pair of document.querySelectorAll('article')) {
    for (const input of pair.querySelectorAll('input:checked')) {
      (all[pair.dataset.pair] ??= {})[input.name.split(' ')[1]] = input.value
    }
  }
  return all
}
const keep = () => { try { localStorage.setItem(name, JSON.stringify([person.value, answers()])) } catch {} }
try {  // a reloaded page goes on
  const [who, all] = JSON.parse(localStorage.getItem(name)) ?? ['', {}]
  person.value = who
  for (const [pair, of] of Object.entries(all)) for (const [question, value] of Object.entries(of)) {
    document.querySelector(`input[name="${pair} ${question}"][value=${value}]`).checked = true
  }
} catch {}
addEventListener('input', keep)
document.querySelector('#save').addEventListener('click', () => {
  const all = answers()
  const open = [...document.querySelectorAll('article')].filter(p => Object.keys(all[p.dataset.pair] ?? {}).length < 2)
  for (const pair of document.querySelectorAll('article')) pair.classList.toggle('open', open.includes(pair))
  if (!person.value.trim()) { said.value = 'Please give a name or a number first.'; person.focus(); return }
  if (open.length) { said.value = `${open.length} pairs are not answered yet.`; open[0].scrollIntoView(); return }
  const text = JSON.stringify({ kit, person: person.value.trim(), answers: all }, null, 2)
  const link = document.createElement('a')
  link.href = URL.createObjectURL(new Blob([text], { type: 'application/json' }))
  link.download = `answers-${person.value.trim().replace(/[^\\w-]+/g, '_')}.json`
  link.click()
  try { localStorage.removeItem(name) } catch {}  // the next person at this computer starts anew
  said.value = 'Saved. Thank you!'
})
"""
