"use strict";
// One job at a time: send the form, follow its events, show the LoRA. Nothing is fetched from elsewhere.

const $ = (id) => document.getElementById(id);
const chosen = []; // {file, weight, item}: in the order in which they are joined
let job = null; // the job's links while it runs
let stop = null; // aborts what is being fetched
let nameTouched = false;
let urls = [];

class Problem extends Error {}

function headers(more = {}) {
  const token = $("token").value;
  return token ? { ...more, Authorization: `Bearer ${token}` } : more;
}

async function ask(address, options = {}) {
  let answer;
  try {
    answer = await fetch(address, { ...options, headers: headers(options.headers) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The service does not answer: see whether it still runs.");
  }
  if (answer.ok) return answer;
  if (answer.status === 401) {
    $("token-label").hidden = false;
    $("token").focus();
  }
  const told = await answer.json().catch(() => ({}));
  throw new Problem(told.detail || `The service answers ${answer.status}.`);
}

function add(files) {
  for (const file of files) {
    const entry = { file, weight: null, item: document.createElement("li") };
    const picture = document.createElement("img");
    const url = URL.createObjectURL(file);
    picture.alt = "";
    picture.onload = picture.onerror = () => URL.revokeObjectURL(url);
    picture.src = url;
    const name = Object.assign(document.createElement("span"), { className: "name", textContent: file.name, title: file.name });
    const label = document.createElement("label");
    entry.weight = Object.assign(document.createElement("input"), { type: "number", step: "any", placeholder: "equal" });
    entry.weight.setAttribute("aria-label", `Weight of ${file.name}`);
    label.append("Weight", entry.weight);
    entry.cached = Object.assign(document.createElement("p"), { className: "cached" });
    const remove = Object.assign(document.createElement("button"), { type: "button", textContent: "Remove" });
    remove.setAttribute("aria-label", `Remove ${file.name}`);
    remove.onclick = () => {
      const index = chosen.indexOf(entry);
      chosen.splice(index, 1);
      entry.item.remove();
      const next = chosen[Math.min(index, chosen.length - 1)];
      (next ? next.item.querySelector("button") : $("files")).focus();
      say(`${file.name} was removed; ${count()}.`);
      suggestName();
    };
    entry.item.append(picture, name, label, entry.cached, remove);
    chosen.push(entry);
    $("pictures").append(entry.item);
  }
  if (files.length) say(`${count()}.`);
  suggestName();
}

const count = () => (chosen.length === 1 ? "1 picture is chosen" : `${chosen.length} pictures are chosen`);
const say = (text) => { $("said").textContent = text; };

function suggestName() {
  if (nameTouched || !chosen.length) return;
  const stem = chosen[0].file.name.replace(/\.[^.]*$/, "").replace(/[/\\:*?"<>|\p{C}]/gu, "").replace(/^[ .]+|[ .]+$/g, "");
  $("name").value = stem.slice(0, 40) || "lora";
}

function form() {
  if (!chosen.length) {
    $("files").focus();
    throw new Problem("Choose one picture or more first.");
  }
  const data = new FormData();
  const weights = chosen.map((entry) => entry.weight.value.trim());
  const given = weights.filter(Boolean).length;
  if (given && given < weights.length) {
    chosen[weights.indexOf("")].weight.focus();
    throw new Problem("Give each picture a weight, or none.");
  }
  for (const { file } of chosen) data.append("pictures", file, file.name);
  if (given) for (const weight of weights) data.append("weights", weight);
  for (const id of ["name", "strength", "dtype", "key_format"]) data.append(id, $(id).value.trim());
  if ($("rank").value.trim()) data.append("rank", $("rank").value.trim());
  return data;
}

async function* events(address, signal) {
  const answer = await ask(address, { signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "));
      if (data) yield JSON.parse(data.slice(6));
    }
  }
}

const STATES = { waiting: "Waiting for its turn", running: "Making the LoRA" };

function show(report) {
  $("progress").value = report.progress;
  const company = report.state === "running" && report.shared_with ? `, together with ${report.shared_with} other requests` : "";
  const text = `${STATES[report.state] || report.state}${company}`;
  if ($("stage").textContent !== text) $("stage").textContent = text;
  $("progress").textContent = `${Math.round(100 * report.progress)} %`;
}

function busy(on) {
  $("make").disabled = on;
  $("cancel").hidden = !on;
  $("work").hidden = !on;
  $("form").setAttribute("aria-busy", String(on));
}

async function make() {
  const data = form();
  stop = new AbortController();
  const signal = stop.signal;
  busy(true);
  say("");
  $("result").hidden = true;
  $("stage").textContent = "Sending";
  $("progress").removeAttribute("value");
  for (const { cached } of chosen) cached.textContent = "";
  const accepted = await ask("/v1/loras", { method: "POST", body: data, headers: { Prefer: "respond-async" }, signal });
  let report = await accepted.json();
  job = report.links;
  for await (const next of events(job.events, signal)) {
    report = next;
    show(report);
  }
  if (report.problem) throw new Problem(report.problem.detail);
  if (report.state !== "done") throw new Problem(`The job is ${report.state}.`);
  await done(report);
}

async function done(report) {
  urls.forEach(URL.revokeObjectURL);
  urls = [];
  const lora = await (await ask(report.links.lora)).blob();
  const url = URL.createObjectURL(lora);
  urls.push(url);
  $("download").href = url;
  $("download").download = `${report.name}.safetensors`;
  $("download").textContent = `Download ${report.name}.safetensors`;
  report.from_cache.forEach((hit, index) => {
    if (chosen[index]) chosen[index].cached.textContent = hit ? "known: came from the cache" : "";
  });
  const hits = report.from_cache.filter(Boolean).length;
  const seconds = Object.entries(report.seconds).map(([stage, value]) => `${stage} ${value.toFixed(2)} s`).join(", ");
  const size = (lora.size / 2 ** 20).toFixed(1);
  $("facts").textContent = `Rank ${report.lora.rank}, ${report.lora.tensors} tensors, ${size} MiB. ` +
    `${hits} of ${report.pictures} pictures came from the cache. ${seconds}.`;
  $("plot").hidden = true;
  $("plot-said").textContent = "Drawing where it acts…";
  $("result").hidden = false;
  $("result").focus();
  try {
    const drawing = URL.createObjectURL(await (await ask(report.links.plot)).blob());
    urls.push(drawing);
    $("plot").src = drawing;
    $("plot").alt = `Heat map of ${report.name}: how strongly each block and target is changed`;
    $("plot").hidden = false;
    $("plot-said").textContent = "Where the LoRA acts: the norm of B @ A for each block and target.";
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    $("plot-said").textContent = error.message;
  }
}

$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  $("problem").textContent = "";
  try {
    await make();
  } catch (error) {
    if (error.name === "AbortError") say("Cancelled.");
    else if (error instanceof Problem) $("problem").textContent = error.message;
    else throw error;
  } finally {
    job = stop = null;
    busy(false);
  }
});

$("cancel").addEventListener("click", async () => {
  const address = job && job.self;
  if (stop) stop.abort();
  $("make").focus();
  if (address) await ask(address, { method: "DELETE" }).catch(() => {});
});

$("files").addEventListener("change", () => {
  add([...$("files").files]);
  $("files").value = "";
});
$("name").addEventListener("input", () => { nameTouched = true; });
for (const kind of ["dragover", "dragenter"]) {
  document.addEventListener(kind, (event) => { event.preventDefault(); $("drop").classList.add("over"); });
}
for (const kind of ["dragleave", "drop"]) document.addEventListener(kind, () => $("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  add([...event.dataTransfer.files]);
});
document.addEventListener("paste", (event) => add([...event.clipboardData.files]));

async function look() {
  try {
    const ready = await (await ask("/readyz")).json();
    $("service").textContent = `Ready: ${ready.backend} (${ready.reason}).`;
  } catch (error) {
    $("service").textContent = error.message;
    setTimeout(look, 2000);
  }
}
look();
