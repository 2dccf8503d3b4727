"use strict";
const byId = id => document.getElementById(id);
const settings = JSON.parse(byId("settings").textContent);
const [low, high] = settings.jacobian_range;
byId("low").textContent = low;
byId("high").textContent = high;

const bytes = name => Uint8Array.from(atob(byId("volume-" + name).textContent), c => c.charCodeAt(0)).buffer;
const names = ["fixed", "moving", "warped", "jacobian", "grid"]; // in this order, the first below

async function start() {
  const viewer = new globalThis.Niivue({
    crosshairWidth: 0.5, backColor: [0.07, 0.07, 0.07, 1], crosshairColor: [1, 0.8, 0.2, 0.8], show3Dcrosshair: true, isColorbar: false,
    loadingText: "", logLevel: "error", isRadiologicalConvention: true, sagittalNoseLeft: true, tileMargin: 4,
    showAllOrientationMarkers: true, fontColor: [1, 1, 1, 1], fontMinPx: 16, crosshairGap: 8,
    crosshairWidthUnit: "voxels", multiplanarShowRender: 0,
  });
  viewer.onLocationChange = place => {
    const millimetres = [...place.mm].slice(0, 3).map((mm, k) => `${(mm < 0 ? "LPI" : "RAS")[k]} ${Math.abs(mm).toFixed(1)}`);
    const value = place.values[names.indexOf("jacobian")].value;
    const limit = value <= low ? " or less" : value >= high ? " or more" : "";
    byId("location").textContent = `${millimetres.join(", ")} mm, Jacobian ${value.toFixed(2)}${limit}`;
  };
  await viewer.attachToCanvas(byId("canvas"));
  // as "gray", but what is dark hides what lies below
  viewer.addColormap("opaque", {R: [0, 255], G: [0, 255], B: [0, 255], A: [255, 255], I: [0, 255]});
  for (const name of names) {
    await viewer.loadFromArrayBuffer(bytes(name), name + ".nii.gz");
    const volume = viewer.volumes.at(-1);
    if (name === "moving" || name === "warped") volume.colormap = "opaque";
    if (name === "jacobian") {
      // NiiVue draws a colour or does not: there is none from 0.9 to 1.1, so that the image is seen there
      viewer.addColormap("jacobian", {R: [0, 140, 0, 0, 255, 255], G: [0, 140, 0, 0, 140, 0], B: [255, 255, 0, 0, 140, 0],
        A: [255, 255, 0, 0, 255, 255], I: [0, 114, 115, 140, 141, 255]});
      volume.cal_min = low;
      volume.cal_max = high;
      volume.colormap = "jacobian";
    }
    if (name === "grid") {
      viewer.addColormap("grid", {R: [0, 0, 190], G: [0, 200, 255], B: [0, 140, 230], A: [0, 255, 255], I: [0, 128, 255]});
      volume.colormap = "grid";
    }
    volume.opacity = 0;
  }
  viewer.setSliceType(viewer.sliceTypeMultiplanar);
  const show = () => {
    const after = Number(byId("time").value), side = Number(byId("side").value);
    const opacity = [1, side * (after < 1 ? 1 : 0), side * after,
      byId("jacobian").checked ? 0.5 : 0, byId("grid").checked ? 0.5 : 0];
    viewer.volumes.forEach((volume, k) => { volume.opacity = opacity[k]; });
    viewer.updateGLVolume();
    byId("legend").hidden = !byId("jacobian").checked;
    const moving = after === 1 ? "moving after registration" : after === 0 ? "moving as scanned" : "moving between before and after";
    byId("shown").textContent = "shown: " + (side === 0 ? "fixed" : side === 1 ? moving : "fixed and " + moving);
  };
  for (const id of ["time", "side", "jacobian", "grid"]) byId(id).oninput = show;
  const keys = {f: "side", b: "time", j: "jacobian", g: "grid"};
  document.onkeydown = event => {
    const input = byId(keys[event.key.toLowerCase()]);
    if (!input || event.ctrlKey || event.metaKey || event.altKey) return;
    if (input.type === "checkbox") input.checked = !input.checked;
    else input.value = Number(input.value) < 0.5 ? 1 : 0;
    show();
    event.stopPropagation();
  };
  show();
  viewer.createOnLocationChange();
  document.body.dataset.ready = "yes";
}
start().catch(error => { byId("problem").textContent = `The images cannot be shown: ${error.message ?? error}`; });
