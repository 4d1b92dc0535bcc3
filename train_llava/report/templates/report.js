"use strict";
(() => {
  const data = JSON.parse(document.getElementById("episodes").textContent);
  const find = (id) => document.getElementById(id);
  const datasets = new Map(data.map((one) => [one.name, one]));

  // Tabs: one panel is shown; the address keeps which.
  const tabs = [...document.querySelectorAll('[role="tab"]')];
  const nav = document.querySelector('[role="tablist"]');

  function show(tab, { focus = false } = {}) {
    stop();
    for (const other of tabs) {
      const chosen = other === tab;
      other.setAttribute("aria-selected", String(chosen));
      other.tabIndex = chosen ? 0 : -1;
      find(other.getAttribute("aria-controls")).hidden = !chosen;
    }
    const panel = find(tab.getAttribute("aria-controls"));
    panel.querySelectorAll("img[data-frame]:not([src])").forEach((image) => {
      image.src = datasets.get(image.dataset.frame).episodes[image.dataset.episode].frames[image.dataset.place];
    });
    find("pick-part").value = String(tabs.indexOf(tab));
    if (focus) tab.focus();
    tab.scrollIntoView({ block: "nearest", inline: "center" });
    const hash = "#" + tab.dataset.name.split("/").map(encodeURIComponent).join("/");
    if (location.hash !== hash) history.replaceState(null, "", hash);
    if (panel.id === "panel-viewer") draw();
  }

  function open(tab) {
    show(tab);
    scrollTo(0, 0);
  }

  function byName(name) {
    return tabs.find((tab) => tab.dataset.name === name);
  }

  function fromAddress() {
    let name = "";
    try {
      name = location.hash.slice(1).split("/").map(decodeURIComponent).join("/");
    } catch {
      // An address that was typed wrong is that of no part.
    }
    open(byName(name) || tabs[0]);
  }

  // A phone has one list instead of the tabs.
  find("pick-part").append(...tabs.map((tab, i) => new Option(tab.textContent, String(i))));
  find("pick-part").addEventListener("change", (event) => open(tabs[Number(event.target.value)]));
  nav.addEventListener("click", (event) => {
    const tab = event.target.closest('[role="tab"]');
    if (tab) open(tab);
  });
  nav.addEventListener("keydown", (event) => {
    const at = tabs.indexOf(document.activeElement);
    const moves = { ArrowDown: at + 1, ArrowRight: at + 1, ArrowUp: at - 1, ArrowLeft: at - 1, Home: 0, End: -1 };
    if (at < 0 || !(event.key in moves)) return;
    event.preventDefault();
    show(tabs.at(moves[event.key] % tabs.length), { focus: true });
  });
  addEventListener("hashchange", fromAddress);

  // Tables: a click on a column's name sorts by it.
  const units = { B: 1, kB: 1e3, MB: 1e6, GB: 1e9, TB: 1e12 };
  const value = (cell) => {
    const [, digits, unit] = cell.textContent.replace(/,/g, "").match(/^(-?[\d.]+)\s*(.*)$/) || [];
    return digits === undefined ? cell.textContent : parseFloat(digits) * (units[unit] || 1);
  };
  document.querySelectorAll(".sort").forEach((button) => {
    button.addEventListener("click", () => {
      const head = button.parentElement;
      const down = head.getAttribute("aria-sort") === "ascending";
      const body = head.closest("table").tBodies[0];
      const rows = [...body.rows].map((row) => [value(row.cells[head.cellIndex]), row]);
      rows.sort(([a], [b]) => {
        const order = typeof a === typeof b ? (a > b) - (a < b) : typeof a === "number" ? -1 : 1;
        return down ? -order : order;
      });
      for (const cell of head.parentElement.cells) cell.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      body.append(...rows.map(([, row]) => row));
    });
  });

  // The viewer: of the chosen episode one step, with its action and the latest frame.
  const state = { dataset: data[0], episode: data[0] && data[0].episodes[0], place: 0, timer: 0 };
  const svg = (name, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, text] of Object.entries(attributes)) element.setAttribute(key, text);
    return element;
  };
  const said = (number) => (number === 0 ? "0" : Number(number.toPrecision(3)).toString());
  const words = {
    delta: "The arrow is the action itself",
    change: "Actions are poses: the arrow is how far the pose moved since the step before",
    none: "These dimensions are no directions in space, so there is no arrow",
  };

  function options(select, texts) {
    select.replaceChildren(...texts.map((text, i) => new Option(text, String(i))));
  }

  function choose(dataset, episode) {
    stop();
    const fresh = state.dataset !== dataset || !find("pick-episode").options.length;
    Object.assign(state, { dataset, episode: dataset.episodes[episode], place: 0 });
    find("pick-dataset").value = String(data.indexOf(dataset));
    if (fresh) options(find("pick-episode"), dataset.episodes.map((one) => `${one.id}: ${one.instruction}`));
    find("pick-episode").value = String(episode);
    find("view-slider").max = String(state.episode.steps.length - 1);
    find("view-told").textContent = `“${state.episode.instruction || "no instruction"}”`;
    const arm = dataset.motion !== "none";
    find("compass-figure").hidden = find("lift-figure").hidden = !arm;
    const [plane, lift] = dataset.reach;
    const across = plane ? `a full arrow is ${said(plane)}` : "nothing moves in x and y";
    const along = lift ? `a full bar ${said(lift)}; orange is up, blue is down` : "nothing along z";
    const full = arm ? `; ${across}, ${along}` : "";
    const honest = arm ? ". Directions are those of the robot's own frame as recorded, not of the picture" : "";
    find("view-honest").textContent = `${words[dataset.motion]}${full}${honest}.`;
    curves();
    draw();
  }

  // One row for each dimension, with its curve over the episode.
  function curves() {
    const { dataset, episode } = state;
    const last = Math.max(1, episode.steps.length - 1);
    const rows = dataset.dimensions.map((dimension, a) => {
      const values = episode.actions.map((action) => action[a]);
      const low = Math.min(...values, dimension.gripper ? 0 : dimension.q01);
      const high = Math.max(...values, dimension.gripper ? 1 : dimension.q99);
      const points = values.map((v, t) => `${(t / last) * 200},${38 - (36 * (v - low)) / (high - low || 1)}`);
      const box = svg("svg", { viewBox: "0 0 200 40", preserveAspectRatio: "none", "aria-hidden": "true" });
      box.append(svg("polyline", { class: "curve", points: points.join(" ") }), svg("path", { class: "cursor" }));
      const row = document.createElement("tr");
      const [name, curve, now] = ["th", "td", "td"].map((kind) => row.appendChild(document.createElement(kind)));
      name.scope = "row";
      name.textContent = dimension.name;
      curve.append(box);
      now.className = "now";
      return row;
    });
    find("view-dims").replaceChildren(...rows);
  }

  function draw() {
    const { episode, dataset, place: t } = state;
    if (!episode) return;
    const step = episode.steps[t];
    const frame = episode.shown.findLastIndex((shown) => shown <= t);
    const pictured = episode.steps[episode.shown[frame]];
    const kept = episode.steps.length < episode.numSteps ? ` kept of ${episode.numSteps}` : "";
    find("view-frame").src = episode.frames[frame];
    find("view-frame").alt = `Frame at step ${pictured} of ${episode.id}`;
    find("view-caption").textContent =
      `step ${step} (${t + 1} of ${episode.steps.length}${kept})` +
      (pictured === step ? "" : `; the frame is that of step ${pictured}`);
    find("view-slider").value = String(t);
    find("view-slider").setAttribute("aria-valuetext", `step ${step}`);
    const x = (t / Math.max(1, episode.steps.length - 1)) * 200;
    [...find("view-dims").rows].forEach((row, a) => {
      row.cells[2].textContent = said(episode.actions[t][a]);
      row.querySelector(".cursor").setAttribute("d", `M${x} 0V40`);
    });
    arrow(episode.arrows[t], dataset.reach);
    gripper(dataset, episode.actions[t]);
  }

  // x of the robot points up on the dial, y to the left.
  function arrow(moved, reach) {
    if (!moved.length) return;
    const [plane, lift] = reach.map((full) => full || 1);
    const [x, y, z] = moved;
    const length = Math.hypot(x, y) / plane;
    const shrink = length > 1 ? 1 / length : 1;
    const [right, down] = [(-y / plane) * shrink * 100, (-x / plane) * shrink * 100];
    const still = Math.hypot(right, down) < 1;
    const look = Math.abs(z) < 0.02 * lift ? "" : z > 0 ? " up" : " down";
    const angle = Math.atan2(down, right);
    const head = Math.min(18, 0.4 * Math.hypot(right, down));
    const barb = (turn) => `${right + head * Math.cos(angle + turn)} ${down + head * Math.sin(angle + turn)}`;
    const path = `M0 0L${right} ${down}M${barb(2.6)}L${right} ${down}L${barb(-2.6)}`;
    find("arrow").setAttribute("d", still ? "" : path);
    find("arrow").setAttribute("class", "arrow" + look);
    const high = Math.min(1, Math.abs(z) / lift) * 100;
    find("lift").setAttribute("height", String(high));
    find("lift").setAttribute("y", String(z > 0 ? -high : 0));
    find("lift").setAttribute("class", look.trim());
  }

  function gripper(dataset, action) {
    const a = dataset.dimensions.findIndex((dimension) => dimension.gripper);
    find("gripper-figure").hidden = a < 0;
    if (a < 0) return;
    const open = Math.min(1, Math.max(0, action[a]));
    find("finger-left").setAttribute("d", `M${-5 - 33 * open} -30V36`);
    find("finger-right").setAttribute("d", `M${5 + 33 * open} -30V36`);
    find("gripper-words").textContent = `gripper ${open < 0.5 ? "closed" : "open"}, ${said(action[a])}`;
  }

  function go(place) {
    state.place = Math.min(state.episode.steps.length - 1, Math.max(0, place));
    draw();
  }

  function stop() {
    clearInterval(state.timer);
    state.timer = 0;
    const button = find("view-play");
    if (button) {
      button.textContent = "Play";
      button.setAttribute("aria-pressed", "false");
    }
  }

  function play() {
    if (state.timer) return stop();
    const last = () => state.place === state.episode.steps.length - 1;
    if (last()) go(0);
    state.timer = setInterval(() => (last() ? stop() : go(state.place + 1)), 180);
    find("view-play").textContent = "Pause";
    find("view-play").setAttribute("aria-pressed", "true");
  }

  function keys(event) {
    const elsewhere = event.target !== document.body && !find("panel-viewer").contains(event.target);
    if (find("panel-viewer").hidden || elsewhere || event.target.closest("select, button, input")) return;
    const { place, episode } = state;
    const moves = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: episode.steps.length - 1 };
    if (event.key === " ") play();
    else if (event.key in moves) go(moves[event.key]);
    else return;
    event.preventDefault();
  }

  if (data.length) {
    options(find("pick-dataset"), data.map((one) => one.name));
    find("pick-dataset").addEventListener("change", (event) => choose(data[Number(event.target.value)], 0));
    find("pick-episode").addEventListener("change", (event) => choose(state.dataset, Number(event.target.value)));
    find("view-slider").addEventListener("input", (event) => go(Number(event.target.value)));
    find("view-back").addEventListener("click", () => go(state.place - 1));
    find("view-on").addEventListener("click", () => go(state.place + 1));
    find("view-play").addEventListener("click", play);
    addEventListener("keydown", keys);
    document.querySelectorAll("[data-view]").forEach((button) => {
      button.addEventListener("click", () => {
        choose(datasets.get(button.dataset.view), Number(button.dataset.episode));
        open(byName("episodes"));
        find("panel-viewer").focus();
      });
    });
    choose(data[0], 0);
  }
  fromAddress();
})();
